"""The environment: versions, device, the path of every kernel and why, and optional libraries."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from fastrl.cli.allocator import described

VERSIONS = (
    "fastrl",
    "torch",
    "triton",
    "numpy",
    "transformers",
    "peft",
    "safetensors",
    "pydantic",
    "rapidfuzz",
    "pycocotools",
)
NATIVE = ("linear_assignment", "detection_reward")  # C++ on the CPU; every other kernel's CPU path is eager torch


def report() -> dict[str, Any]:
    """Everything ``fastrl doctor`` prints, as plain values."""
    return {
        "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
        "device": device(),
        "kernels": {name: kernel_path(name) for name in kernel_names()},
        "attention": attention(),
        "memory": {"allocator": described(os.environ)},
        "optional": optional(),
    }


def version(name: str) -> str | None:
    """Installed version of a distribution; None if it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def device() -> dict[str, Any]:
    """The device training would use."""
    found: dict[str, Any] = {"cpu_threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "count": torch.cuda.device_count(),
        }
    return found


def kernel_names() -> list[str]:
    """The public kernels."""
    import fastrl_kernels

    return [name for name in fastrl_kernels.__all__ if name.islower() and callable(getattr(fastrl_kernels, name))]


def kernel_path(name: str) -> str:
    """The implementation used for tensors on the default device, and why."""
    from fastrl_kernels import _native
    from fastrl_kernels._common import interpreting
    from fastrl_kernels._triton import HAS_TRITON

    if interpreting():
        return "triton interpreter (TRITON_INTERPRET=1)"
    if torch.cuda.is_available():
        return "triton" if HAS_TRITON else "eager (triton is not installed)"
    if name in NATIVE:
        return "C++ (no GPU)" if _native.library() is not None else f"eager (no GPU; {_native.why_not()})"
    return "eager (no GPU)"


def attention() -> dict[str, str]:
    """The attention path of training on the default device, and why; which variable-length library was found."""
    from fastrl_kernels import varlen

    cuda = torch.cuda.is_available()
    here = torch.device("cuda" if cuda else "cpu")
    found = varlen.find(hopper=varlen.is_hopper(here))
    missing = f" (not: {'; '.join(found.missing)})" if found.missing else ""
    return {
        "bfloat16": varlen.choose(here, torch.bfloat16, 128).reason,
        "float32": varlen.choose(here, torch.float32, 128).reason,
        "variable length": f"{found.name}{missing}",
        "rollout": "a static cache and CUDA graphs" if cuda else _decoding(),
    }


def _decoding() -> str:
    """How a CPU decodes float32 models."""
    from fastrl_kernels.decode_step import unavailable

    missing = unavailable()
    eager = "eager steps over the keys written so far (no GPU"
    return f"{eager}; {missing})" if missing else "several steps in one call to C++ (no GPU; float32)"


def optional() -> dict[str, str]:
    """Optional libraries: usable, or why not."""
    found = {name: _importable(name) for name in ("flash_attn", "liger_kernel", "deepspeed", "trl", "av", "motmetrics")}
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        found["varlen_attn"] = f"not in torch {torch.__version__}"
    else:
        found["varlen_attn"] = "usable" if torch.cuda.is_available() else "present; needs a GPU"
    for name in ("flash_attn", "liger_kernel"):
        if found[name] == "usable" and not torch.cuda.is_available():
            found[name] = "installed; needs a GPU"
    found["compiler"] = os.environ.get("CXX") or _which("g++") or _which("clang++") or "none found"
    return found


def _which(name: str) -> str | None:
    import shutil

    return name if shutil.which(name) else None


def _importable(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"installed but does not import: {type(error).__name__}: {error}"
    return "usable"


def print_report(found: dict[str, Any]) -> None:
    """The report as plain aligned lines."""
    for section, values in found.items():
        print(section)
        for name, value in values.items():
            print(f"  {name:<22} {'not installed' if value is None else value}")
