"""``fastrl export``: write a run, a model or adapters as one standard Hugging Face folder, with adapters merged and
weights cast; upload it on request only."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastrl.config.registry import nearest
from fastrl.data.disk import nothing_empty_left, require_space
from fastrl.data.files import write_atomically
from fastrl.models.open import resolve_model
from fastrl.models.weights import read_weights, reading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER = "adapter_config.json"
CONFIG = "config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")  # keys of a config; the second was used before transformers 5
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Exported(NamedTuple):
    """The result of :func:`export`."""

    source: Path  # the folder that was read
    out: Path
    files: int
    bytes: int
    merged: bool  # whether adapters were merged


def export(
    source: str | Path, out: Path, *, dtype: str | None = None, base: str | Path | None = None, best: bool = False
) -> Exported:
    """Write one model as a standard Hugging Face folder, atomically.

    Args:
        source: a run's folder (its last checkpoint), a checkpoint, a model (folder, ``tiny:NAME`` or downloaded hub
            name), or a folder of LoRA adapters in peft's format.
        out: the new folder; it must be empty if it exists.
        dtype: type of the weights: ``float32``, ``bfloat16`` or ``float16``; None: as stored.
        base: the model under the adapters; None: the one that the adapters' config names.
        best: for a run, export the best checkpoint of its evaluations.

    Raises:
        FileNotFoundError: the model does not exist, or the run has no checkpoint yet.
        ValueError: ``out`` is not empty, the dtype is unknown, ``base`` is given without adapters, the adapters are not
            LoRA's, a file cannot be read, or the files lack a weight of the model.
        OSError: there is no space on the disk.
    """
    if dtype is not None and dtype not in DTYPES:
        near = nearest(dtype, DTYPES)
        hint = f"; did you mean {near}?" if near else "."
        raise ValueError(f"--dtype: unknown dtype {dtype!r}{hint} Allowed: {', '.join(DTYPES)}")
    folder = find_source(source, best=best)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: choose another folder")
    adapters = (folder / ADAPTER).is_file()
    if base is not None and not adapters:
        raise ValueError(f"--base is the model under adapters, and {folder} has none ({ADAPTER})")
    with _staging(out) as staging:
        if adapters:
            _merge(folder, base, staging, dtype)
        else:
            _copy(folder, staging, dtype)
    written = [path for path in out.rglob("*") if path.is_file()]
    return Exported(folder, out, len(written), sum(path.stat().st_size for path in written), adapters)


def find_source(source: str | Path, *, best: bool = False) -> Path:
    """The folder of weights or adapters that ``source`` names (see :func:`export`)."""
    path = Path(source)
    is_run = (path / "checkpoints").is_dir()
    if best and not is_run:
        raise ValueError(f"--best: {source} is not the folder of a run")
    if is_run:
        found = path / "checkpoints" / "best" / "model" if best else path / "model"
        if not found.is_dir():
            what = "no best checkpoint: was it evaluated (eval.spec)?" if best else "no checkpoint yet"
            raise FileNotFoundError(f"{source}: {what}")
        return found.resolve()
    if (path / ADAPTER).is_file() or (path / CONFIG).is_file():
        return path
    return path / "model" if (path / "model" / CONFIG).is_file() else resolve_model(source)


def push(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload a folder to a repository on the Hugging Face hub, which is created if needed; returns its address.

    Raises:
        ValueError: ``repo`` is not ``owner/name``, or the hub refuses or cannot be reached; the folder is kept.
        ImportError: huggingface_hub is not installed.
    """
    check_repo(repo)
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        made = api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload a model from fastrl")
    except Exception as error:  # such as no token, no network or no permission
        raise ValueError(
            f"--push {repo}: the upload failed ({type(error).__name__}: {error}); the model is in {folder}"
        ) from error
    return str(getattr(made, "commit_url", made))


def check_repo(repo: str) -> None:
    """Raise ``ValueError`` unless ``repo`` is ``owner/name``."""
    if not _REPO.fullmatch(repo):
        raise ValueError(f"--push: expected owner/name of a repository on the hub, got {repo!r}")


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A new folder next to ``out`` for a block, renamed to ``out`` at the end; removed if the block fails."""
    staging = out.with_name(f".{out.name}.writing")
    with nothing_empty_left(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
            yield staging
            if out.is_dir():
                out.rmdir()  # it is empty
            os.rename(staging, out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _copy(folder: Path, staging: Path, dtype: str | None) -> None:
    """Copy a model folder with its weights cast, one file at a time."""
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / CONFIG).is_file() or not weights:
        raise ValueError(f"{folder}: has no {CONFIG} or no .safetensors files: not a model that can be exported")
    require_space(staging, 2 * sum(path.stat().st_size for path in weights))
    _check_whole(folder)
    total = 0
    for path in weights:
        with reading(folder, path.name):
            total += _cast(path, staging / path.name, dtype)
    for path in folder.iterdir():
        if path in weights or not path.is_file() or path.name.startswith("."):
            continue
        if path.name == CONFIG and dtype is not None:
            _write_config(path, staging / CONFIG, dtype)
        elif path.name.endswith(".safetensors.index.json"):
            index = json.loads(path.read_text(encoding="utf-8"))
            index["metadata"] = {**index.get("metadata", {}), "total_size": total}
            write_atomically(staging / path.name, json.dumps(index, indent=2) + "\n")
        else:
            shutil.copyfile(path, staging / path.name)


def _check_whole(folder: Path) -> None:
    """Raise ``ValueError`` if the files of a model that we can load lack one of its weights."""
    from fastrl.models.families import FAMILIES
    from fastrl.models.load import read_config

    config = read_config(folder)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None:
        read_weights(family(config).model_class(), folder, dtype=torch.float32, device="meta")


def _cast(path: Path, out: Path, dtype: str | None) -> int:
    """Copy a file of weights with its floating-point numbers cast; returns the bytes of its tensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        metadata = file.metadata() or {"format": "pt"}
    if dtype is not None:
        tensors = {n: t.to(DTYPES[dtype]) if t.is_floating_point() else t for n, t in tensors.items()}
        nonfinite = next(
            (n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())), None
        )
        if nonfinite is not None:
            raise ValueError(f"{nonfinite} has numbers that are not finite in {dtype}")
    save_file(tensors, out, metadata=metadata)
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _write_config(path: Path, out: Path, dtype: str) -> None:
    """Copy a config with the dtype replaced wherever it is stated."""

    def changed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: dtype if k in DTYPE_KEYS and isinstance(v, str) else changed(v) for k, v in value.items()}

    write_atomically(out, json.dumps(changed(json.loads(path.read_text(encoding="utf-8"))), indent=2) + "\n")


def _merge(adapters: Path, base: str | Path | None, staging: Path, dtype: str | None) -> None:
    """Write the base model with the adapters merged."""
    from peft import PeftModel

    from fastrl.models.families import family_of
    from fastrl.models.load import read_config
    from fastrl.models.lora import merged_state_dict
    from fastrl.models.policy import quiet_progress

    with reading(adapters, ADAPTER):
        settings = json.loads((adapters / ADAPTER).read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{adapters}: adapters of type {settings.get('peft_type')}; only LORA can be merged")
    named = base if base is not None else settings.get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{adapters}: no base model is named: give it with --base")
    folder = resolve_model(named)
    config = read_config(folder)
    family = family_of(config, folder)
    stored = next((config[key] for key in DTYPE_KEYS if config.get(key) in DTYPES), "float32")
    core = family.load(folder, DTYPES[dtype or stored])
    with reading(adapters, "adapters"):
        PeftModel.from_pretrained(core, str(adapters))
    with quiet_progress():
        core.save_pretrained(staging, state_dict=merged_state_dict(core))
    for path in folder.iterdir():
        kept = path.is_file() and ".safetensors" not in path.name and path.suffix not in (".bin", ".pt", ".pth")
        if kept and not (staging / path.name).exists():
            shutil.copyfile(path, staging / path.name)
