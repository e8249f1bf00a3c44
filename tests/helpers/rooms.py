"""The order of the rooms of ``fastrl``, as ``docs/tree.md`` writes it."""

from __future__ import annotations

# From the ground up. A room imports from the levels below its own: neither from those above nor from a neighbour.
LEVELS = (
    ("segments", "clock", "http"),
    ("config", "answers"),
    ("captions", "data"),
    ("rewards",),
    ("engine", "batch"),
    ("models",),
    ("rollout",),
    ("critics",),
    ("methods",),
    ("recipe",),
    ("evaluate", "run", "plan"),
    ("trainer",),
    ("studies", "report", "build", "integrations"),
    ("toy",),
    ("cli",),
)
