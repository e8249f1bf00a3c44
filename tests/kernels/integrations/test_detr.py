"""The DETR matchers against transformers' own: equal matches, and equal losses in training."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels.integrations.detr import (
    DeformableDetrHungarianMatcher,
    HungarianMatcher,
    Mask2FormerHungarianMatcher,
    RTDetrHungarianMatcher,
)

detr_loss = pytest.importorskip("transformers.loss.loss_for_object_detection")
deformable_loss = pytest.importorskip("transformers.loss.loss_deformable_detr")
rt_loss = pytest.importorskip("transformers.loss.loss_rt_detr")

RT_CONFIG = {"matcher_class_cost": 2.0, "matcher_bbox_cost": 5.0, "matcher_giou_cost": 2.0}
RT_CONFIG |= {"matcher_alpha": 0.3, "matcher_gamma": 1.5}


def rt_pair(focal: bool) -> tuple[Any, Any]:
    config = SimpleNamespace(**RT_CONFIG, use_focal_loss=focal)
    return rt_loss.RTDetrHungarianMatcher(config), RTDetrHungarianMatcher(config)


PAIRS = {
    "detr": lambda: (detr_loss.HungarianMatcher(1, 5, 2), HungarianMatcher(1, 5, 2)),
    "detr-defaults": lambda: (detr_loss.HungarianMatcher(), HungarianMatcher()),
    "deformable": lambda: (
        deformable_loss.DeformableDetrHungarianMatcher(2, 5, 2),
        DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2),
    ),
    "rt-focal": lambda: rt_pair(True),
    "rt-softmax": lambda: rt_pair(False),
}


def random_case(sizes: list[int], queries: int, classes: int = 7) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    outputs = {
        "logits": torch.randn(len(sizes), queries, classes),
        "pred_boxes": torch.rand(len(sizes), queries, 4) * 0.8 + 0.01,
    }
    targets = [{"class_labels": torch.randint(0, classes, (k,)), "boxes": torch.rand(k, 4) * 0.8 + 0.01} for k in sizes]
    return outputs, targets


def assert_same(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert a.dtype == b.dtype == torch.int64
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sizes", [[3, 0, 11], [30, 1, 12], [0, 0], [1]])
def test_equals_transformers(name: str, sizes: list[int]) -> None:
    theirs, ours = PAIRS[name]()
    for _ in range(5):
        outputs, targets = random_case(sizes, 20)
        assert_same(ours(outputs, targets), theirs(outputs, targets))


def test_queries_that_are_not_finite_are_a_last_resort() -> None:
    theirs, ours = PAIRS["detr"]()
    outputs, targets = random_case([4, 6], 10)
    outputs["logits"][0, 2] = torch.nan
    outputs["logits"][1, :3] = torch.inf
    found = ours(outputs, targets)
    with suppress(ValueError):  # raised by older releases of transformers
        assert_same(found, theirs(outputs, targets))
    outputs["pred_boxes"][1, 3] = torch.nan  # refused there
    assert not set(ours(outputs, targets)[1][0].tolist()) & {0, 1, 2, 3}
    outputs["logits"][0, :8] = torch.nan  # two queries left for four targets: all four are still matched
    queries, chosen = ours(outputs, targets)[0]
    assert len(queries) == 4
    assert chosen.sort().values.tolist() == [0, 1, 2, 3]
    assert {8, 9} <= set(queries.tolist())


MASK_MATCHERS = {
    "mask2former": "Mask2FormerHungarianMatcher",
    "eomt": "EomtHungarianMatcher",
    "oneformer": "OneFormerHungarianMatcher",
}


@pytest.mark.parametrize("family", MASK_MATCHERS)
@pytest.mark.parametrize("weights", [(2.0, 5.0, 5.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("sizes", [[3, 1, 11], [30, 2], [5]])
def test_masks_at_points_equal_transformers(family: str, weights: tuple[float, ...], sizes: list[int]) -> None:
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    theirs = getattr(module, MASK_MATCHERS[family])(*weights, num_points=50)
    ours = Mask2FormerHungarianMatcher(*weights, num_points=50)
    masks, classes = 4 * torch.randn(len(sizes), 12, 9, 7), torch.randn(len(sizes), 12, 6)
    labels = [torch.randint(5, (k,)) for k in sizes]
    wanted = [(torch.rand(k, 20 + i, 30) > 0.6).float() for i, k in enumerate(sizes)]  # of the images' own sizes
    state = torch.get_rng_state()
    expected = theirs(masks, classes, wanted, labels)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    found = ours(masks, classes, wanted, labels)
    assert torch.equal(torch.get_rng_state(), after)  # the random state after it is the same, too
    assert_same(found, expected)


def test_an_image_without_masks_matches_nothing() -> None:
    masks, classes = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 3)
    wanted = [torch.zeros(0, 8, 8), torch.ones(2, 8, 8)]
    found = Mask2FormerHungarianMatcher(num_points=10)(
        masks, classes, wanted, [torch.zeros(0, dtype=torch.int64), torch.tensor([1, 0])]
    )
    assert [len(queries) for queries, _ in found] == [0, 2]


def test_all_costs_zero_is_refused_as_there() -> None:
    with pytest.raises(ValueError, match="at least one must not be 0"):
        HungarianMatcher(0, 0, 0)
    with pytest.raises(ValueError, match="at least one must not be 0"):
        Mask2FormerHungarianMatcher(0, 0, 0)


def tiny_detr() -> Any:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_queries=12,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_labels=5,
        auxiliary_loss=True,
        dropout=0.0,
    )
    torch.manual_seed(0)
    model = transformers.DetrForObjectDetection(config).train()
    with torch.no_grad():  # at first all queries answer alike to 1e-6, so rounding would decide the match
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "backbone" not in name:
                weight.normal_(std=1.0 if "query" in name else weight.shape[1] ** -0.5)
    return model


def train(steps: int) -> list[float]:
    model = tiny_detr()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        pixels = torch.randn(2, 3, 64, 64, generator=generator)
        labels = [
            {
                "class_labels": torch.randint(0, 5, (k,), generator=generator),
                "boxes": torch.rand(k, 4, generator=generator) * 0.5 + 0.2,
            }
            for k in (3, 5)
        ]
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_a_tiny_detr_gives_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = train(4)
    original, used = detr_loss.HungarianMatcher, []

    class Recorded(HungarianMatcher):
        def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Any:
            used.append(len(targets))
            matches = super().forward(outputs, targets)
            assert_same(matches, original(self.class_cost, self.bbox_cost, self.giou_cost)(outputs, targets))
            return matches

    monkeypatch.setattr(detr_loss, "HungarianMatcher", Recorded)
    ours = train(4)
    assert used == [2] * 8  # the final and one auxiliary layer, each step
    assert ours == pytest.approx(theirs, rel=1e-6)  # the matches are equal; threads may round sums differently
    assert len(set(ours)) == 4


@pytest.mark.gpu
def test_no_copy_to_the_host() -> None:
    theirs, ours = PAIRS["detr"]()
    outputs, targets = random_case([3, 0, 11], 50)
    on_device = {k: v.cuda() for k, v in outputs.items()}
    there = [{k: v.cuda() for k, v in target.items()} for target in targets]
    ours(on_device, there)
    torch.cuda.set_sync_debug_mode("error")
    matches = ours(on_device, there)
    torch.cuda.set_sync_debug_mode("default")
    assert_same([(i.cpu(), j.cpu()) for i, j in matches], theirs(outputs, targets))
