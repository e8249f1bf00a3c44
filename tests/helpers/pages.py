"""How pages write measured numbers."""

from __future__ import annotations

import re

CHANGE = re.compile(r"([+−]\d+\.\d{3}) \[([+−]\d+\.\d{3}), ([+−]\d+\.\d{3})\]")  # with its interval


def signed(value: float) -> str:
    """A change, with a minus sign."""
    return f"{value:+.3f}".replace("-", "−")
