"""Limits that recipes and the code that keeps them share."""

from __future__ import annotations

MAX_IMAGE_PIXELS = 64_000_000  # width x height of the largest picture that is opened by default
