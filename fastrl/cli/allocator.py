"""The settings of torch's GPU allocator, which it reads once, before its first allocation."""

from __future__ import annotations

from collections.abc import MutableMapping

NAMES = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # the second is the older name of the first
EXPANDABLE = "expandable_segments:True"


def use_expandable_segments(environ: MutableMapping[str, str]) -> None:
    """Ask for expandable segments where the user has set nothing: lengths of answers differ from step to step, which
    splits fixed segments into pieces that are too small for the next step. Values are not affected."""
    if not any(name in environ for name in NAMES):
        environ[NAMES[0]] = EXPANDABLE


def described(environ: MutableMapping[str, str]) -> str:
    """The settings as they stand, with the recommendation where they differ from it."""
    told = next((f"{name}={environ[name]}" for name in NAMES if name in environ), "not set")
    return told if EXPANDABLE in told else f"{told}; recommended: {NAMES[0]}={EXPANDABLE}"
