"""The recipe key that makes the head's gradients in the forward trains to the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastrl.recipe import RecipeError, load_recipe
from fastrl.trainer import Run
from tests.helpers.training import make_recipe, make_records

Folder = Callable[[str], Path]


@pytest.mark.parametrize("extra", [{}, {"method__beta": 0.05}, {"model__freeze": ["*embed_tokens*"]}])
def test_row_local_head_trains_to_the_same_weights(tiny_folder: Folder, tmp_path: Path, extra: dict) -> None:
    """Two steps each way, in several micro-batches, with trained and frozen heads."""
    ended = []
    for row_local in (False, True):
        recipe = make_recipe(
            tiny_folder("qwen2_5"),
            tmp_path / str(row_local),
            optim__row_local_head=row_local,
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
        torch.testing.assert_close(fused[name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_row_local_head_refuses_several_updates() -> None:
    with pytest.raises(RecipeError, match="row_local_head"):
        load_recipe("perception-r1-grounding-tiny", ["optim.row_local_head=true", "optim.updates_per_batch=2"])
