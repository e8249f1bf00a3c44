"""``fastrl plan``: GPU requirements of a recipe, from the model's config only (nothing is loaded or allocated)."""

from fastrl.plan.advice import Change, advise
from fastrl.plan.estimate import EFFICIENCY, Plan, make_plan
from fastrl.plan.hardware import gpu_named
from fastrl.plan.sharded import engine_settings
from fastrl.plan.show import plan_text, plan_values

__all__ = [
    "EFFICIENCY",
    "Change",
    "Plan",
    "advise",
    "engine_settings",
    "gpu_named",
    "make_plan",
    "plan_text",
    "plan_values",
]
