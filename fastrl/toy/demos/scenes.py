"""The held-out scenes of a demo: like those its recipe trains on, with another seed."""

from __future__ import annotations

from fastrl.data import parse_spec

HELD_OUT_SEED = 1_000_003  # no recipe and no demo trains on scenes of this seed; settings were chosen on it
REPORTED_SEED = 2_000_003  # nothing is trained or chosen on scenes of this seed; claims are held to it


def scenes_like(spec: str, *, n: int, seed: int = HELD_OUT_SEED) -> str:
    """``spec`` with other ``n`` and ``seed`` and the same task, difficulty and picture size.

    Raises:
        ValueError: not a data specification.
    """
    adapter, path, options = parse_spec(spec)
    changed = options | {"n": str(n), "seed": str(seed)}
    return f"{adapter}:{path}?" + "&".join(f"{key}={value}" for key, value in changed.items())
