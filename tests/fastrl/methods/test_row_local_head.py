"""The recipe key that computes the head's gradients in the forward leads to the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl.methods import PerceptionR1
from fastrl.methods.perception_r1 import PerceptionR1Options
from fastrl.recipe import RecipeError, load_recipe
from fastrl.trainer import Run
from tests.helpers.training import make_recipe, make_records

Folder = Callable[[str], Path]


@pytest.mark.parametrize("extra", [{}, {"method__beta": 0.05}, {"model__freeze": ["*embed_tokens*"]}])
def test_row_local_head_trains_to_the_same_weights(tiny_folder: Folder, tmp_path: Path, extra: dict) -> None:
    """Two steps with and without it, in several micro-batches, with trained and frozen heads.

    The two fold logits by different code (entropy is measured in one alone), so their gradients differ by rounding: by
    1.4e-7 of their norm, each 7e-7 from a float64 gradient. AdamW divides a gradient by its own size plus ``eps``,
    which at 1e-8 turns that into 2e-5 for weights whose gradient is nearly 0. At 1e-3, the learning rate, an update is
    off by no more than the gradient is: what remains is the rounding of the weights themselves.
    """
    ended = []
    for row_local in (False, True):
        recipe = make_recipe(
            tiny_folder("qwen2_5"),
            tmp_path / str(row_local),
            optim__row_local_head=row_local,
            optim__eps=1e-3,
            optim__token_budget=64,
            **extra,
        )
        run = Run(recipe, records=make_records())
        rows = [run.step(n)[0] for n in (1, 2)]
        assert rows[0]["update/micro_batches"] > 1
        ended.append(({n: p.detach() for n, p in run.policy.core.named_parameters()}, rows))
    (plain, plain_rows), (fused, fused_rows) = ended
    for a, b in zip(plain_rows, fused_rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert 0 <= b["sampler/gap_mean"] <= b["sampler/gap_max"] < 1e-4
        assert b["sampler/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    for name, weight in plain.items():
        torch.testing.assert_close(fused[name], weight, rtol=1e-6, atol=2e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_row_local_head_refuses_several_updates() -> None:
    with pytest.raises(RecipeError, match="row_local_head"):
        load_recipe("perception-r1-grounding-tiny", ["optim.row_local_head=true", "optim.updates_per_batch=2"])


def chosen(loss: str, ratio: str, importance: str, level: str) -> dict[str, str]:
    return {"loss": loss, "ratio": ratio, "importance": importance, "importance_level": level}


CHOICES = itertools.product(
    ("grpo", "cispo", "sapo", "gspo", "gspo-token"), ("token", "sequence"), ("none", "truncate"), ("token", "sequence")
)
ALLOWED = [chosen(*c) for c in CHOICES if c[0] != "gspo-token" or c[2] == "none" or c[3] == "sequence"]


@pytest.mark.parametrize("keys", ALLOWED, ids=lambda keys: "-".join(keys.values()))
def test_a_recipe_is_refused_where_the_kernel_would_refuse_its_first_step(keys: dict[str, str]) -> None:
    """The batch of a first update: there are no old log-probs yet."""
    options = PerceptionR1Options.model_validate({**keys, "beta": 0.0})
    batch: Any = SimpleNamespace(
        targets=torch.tensor([1, 0, 2]),
        completion_of_token=torch.tensor([0, 0, 1]),
        per_completion={"advantage": torch.tensor([1.0, -1.0])},
        per_token={"weight": torch.full((3,), 1 / 3), "sampler_logp": torch.full((3,), -1.0)},
    )
    method: Any = SimpleNamespace(options=options, temperature=1.0)
    changes = {"optim.row_local_head": True, **{f"method.{key}": value for key, value in keys.items()}}
    try:
        PerceptionR1.row_local_loss(method, torch.ones(3, 4), torch.eye(5, 4), batch, None)
    except ValueError:
        with pytest.raises(RecipeError, match=r"optim\.row_local_head: true .*method\.\w+: [\w-]+ needs all rows"):
            load_recipe("perception-r1-grounding-tiny", changes)
    else:
        assert load_recipe("perception-r1-grounding-tiny", changes).optim.row_local_head


def test_a_recipe_whose_method_has_no_row_local_loss_is_refused() -> None:
    for name in ("perpo-grounding-tiny", "utr-tiny"):
        kind = load_recipe(name).method.kind
        with pytest.raises(RecipeError, match=rf"optim\.row_local_head: true .* method\.kind: {kind} has no row-local"):
            load_recipe(name, ["optim.row_local_head=true"])
