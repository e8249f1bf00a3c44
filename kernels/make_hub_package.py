"""Write the kernels as a package for the Hugging Face Kernel Hub, from the sources next to this file::

    python kernels/make_hub_package.py build/hub --repo-id OWNER/fastrl-kernels

This writes a project for ``kernel-builder`` (``build.toml``, ``flake.nix``, ``CARD.md``, ``torch-ext/``) and, since
nothing has to be compiled, also its builds (``build/torch-cuda``, ``build/torch-cpu``), which
``kernels.get_local_kernel`` can load directly.

A hub kernel may be in any folder, and several versions may be loaded in one process. So imports are made relative, and
operators are registered in a namespace of this build (``_ops.py``) instead of ``fastrl::``. Left out are the compiled
CPU paths (the eager ones compute the same), the ahead-of-time compiler of CI, and the integrations, which are imported
by name.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
from pathlib import Path

PACKAGE = Path(__file__).parent / "fastrl_kernels"
NAME, MODULE = "fastrl-kernels", "fastrl_kernels"
BACKENDS = ("cpu", "cuda")
LEFT_OUT = ("aot.py", "_aot*.py")

_FROM_MODULE = re.compile(r"^(\s*)from fastrl_kernels\.", re.MULTILINE)
_FROM_PACKAGE = re.compile(r"^(\s*)from fastrl_kernels import ", re.MULTILINE)
_OP_NAME = re.compile(r'"fastrl::(\w+)"')
_OP = re.compile(r"\btorch\.ops\.fastrl\.")
_EXTENSION = re.compile(r'"fastrl_kernels(\._C)"')
_FUTURE = "from __future__ import annotations\n"

OPS = '''"""The operators of this build, in a namespace of its own: versions that share a process share none."""

import torch

NAMESPACE = "{namespace}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """``op_name`` as this build registers it."""
    return f"{{NAMESPACE}}::{{op_name}}"
'''

BUILD = """[general]
name = "{name}"
version = {version}
edition = 6
license = "Apache-2.0"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""

FLAKE = """{
  description = "Kernels for RL post-training of perception MLLMs";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

CARD = """---
library_name: kernels
license: apache-2.0
---

# {name}

Kernels for reinforcement-learning post-training of perception MLLMs: log-probs and entropy of a linear head without
its logits, policy, listwise and unlikelihood losses, IoU, linear assignment and detection rewards in batches, decoding
over a shared prefix. Triton on a GPU; on a CPU the same functions in eager torch.

```python
from kernels import get_kernel

kernels = get_kernel("{repo_id}", version={version})
out = kernels.linear_logprob(hidden, lm_head.weight, target, return_entropy=True)  # [N, H], [V, H], [N]
```

Functions: {functions}. Each has an eager twin in `reference` and a docstring with shapes, dtypes and the paper it is
from. Needs torch 2.11 and Triton 3.6 or newer.
"""


def relative(source: str, file: str) -> str:
    """A module's source with relative imports and with operators in the build's namespace.

    Raises:
        ValueError: it would still refer to the installed package or its operators.
    """
    text = _FROM_MODULE.sub(r"\1from .", source)
    text = _FROM_PACKAGE.sub(r"\1from . import ", text)
    text = _EXTENSION.sub(r'f"{__package__}\1"', text)
    used = []
    for name, pattern, replacement in (
        ("add_op_namespace_prefix", _OP_NAME, r'add_op_namespace_prefix("\1")'),
        ("ops", _OP, "ops."),
    ):
        text, count = pattern.subn(replacement, text)
        used += [name] if count else []
    if used:
        if _FUTURE not in text:
            raise ValueError(f"{file}: expected the line {_FUTURE.strip()!r}, after which _ops is imported")
        text = text.replace(_FUTURE, f"{_FUTURE}\nfrom ._ops import {', '.join(used)}\n", 1)
    _check(ast.parse(text), file)
    return text


def _check(tree: ast.Module, file: str) -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        found = None
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == MODULE:
            found = f"from {node.module}"
        elif isinstance(node, ast.Import):
            found = next((alias.name for alias in node.names if alias.name.split(".")[0] == MODULE), None)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found = node.value if re.match(r"fastrl(_kernels)?(::|\.|$)", node.value) else None
        elif isinstance(node, ast.Attribute) and node.attr == "fastrl":
            found = "torch.ops.fastrl"
        if found is not None:
            line = getattr(node, "lineno", 0)
            raise ValueError(f"{file}, line {line}: {found!r} names the installed package or its operators")


def sources() -> dict[str, str]:
    """File name → text of every module of the hub package."""
    left_out = {path for pattern in LEFT_OUT for path in PACKAGE.glob(pattern)}
    files = [path for path in sorted(PACKAGE.glob("*.py")) if path not in left_out]
    return {path.name: relative(path.read_text(encoding="utf-8"), path.name) for path in files}


def make(out: Path, *, version: int = 1, repo_id: str = f"fastrl/{NAME}") -> list[Path]:
    """Write the project and its builds under ``out``; returns the builds' folders.

    Builds of different versions or sources can be loaded in one process.
    """
    files = sources()
    digest = hashlib.sha256(json.dumps([version, files], sort_keys=True).encode()).hexdigest()[:12]
    functions = ", ".join(f"`{name}`" for name in _public(files["__init__.py"]) if name[0].islower())
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    _write(out / "torch-ext" / MODULE, files)
    _write(
        out,
        {
            "build.toml": BUILD.format(name=NAME, version=version, repo_id=repo_id, backends=backends),
            "flake.nix": FLAKE,
            "CARD.md": CARD.format(name=NAME, version=version, repo_id=repo_id, functions=functions),
        },
    )
    builds = []
    for backend in BACKENDS:
        identity = f"_{MODULE}_{backend}_{digest}"
        metadata = {"name": NAME, "id": identity, "version": version, "license": "Apache-2.0", "python-depends": []}
        metadata["backend"] = {"type": backend}
        builds.append(out / "build" / f"torch-{backend}")
        made = {"_ops.py": OPS.format(namespace=identity), "metadata.json": json.dumps(metadata, indent=2) + "\n"}
        _write(builds[-1], files | made)
    return builds


def _public(init: str) -> list[str]:
    """``__all__`` of the package."""
    for node in ast.parse(init).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError("__init__.py: no __all__")


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write these files into ``folder`` and remove modules left by an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.py"):
        if old.name not in files:
            old.unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0].rstrip(":"))
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--version", type=int, default=1, help="of the hub package, a whole number [1]")
    parser.add_argument("--repo-id", default=f"fastrl/{NAME}", help="on the hub [%(default)s]")
    args = parser.parse_args()
    for build in make(args.out, version=args.version, repo_id=args.repo_id):
        print(build)


if __name__ == "__main__":
    main()
