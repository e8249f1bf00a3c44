"""The order of the folders of ``fastrl``, as in ``docs/tree.md``."""

from __future__ import annotations

# From the bottom up. A folder imports from lower levels only, neither from higher ones nor from its own level.
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
    ("report", "build", "integrations"),
    ("toy",),
    ("studies",),
    ("cli",),
)
