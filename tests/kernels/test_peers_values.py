"""The cases of other libraries' own tests, as the numbers that they assert.

SciPy (``scipy.sparse.csgraph``'s and ``scipy.optimize``'s assignment), torch-linear-assignment, torchvision and fvcore
(boxes), TensorFlow Addons (GIoU), allRank and TensorFlow Ranking (listwise losses), PyTorch's documentation
(cross-entropy). Code of theirs that runs on a CPU is called in ``test_parity`` and ``integrations``.
"""

from __future__ import annotations

from itertools import product
from math import exp, inf, log

import pytest
import torch
from torch import Tensor

from fastrl_kernels import cross_entropy, linear_assignment, listwise_loss, pairwise_iou
from fastrl_kernels.linear_assignment import INFEASIBLE, INVALID

pytestmark = pytest.mark.usefixtures("path")

# ---- assignment: SciPy, torch-linear-assignment

SCIPY = [
    ([[400, 150, 400], [400, 450, 600], [300, 225, 300]], [150, 400, 300]),
    ([[400, 150, 400, 1], [400, 450, 600, 2], [300, 225, 300, 3]], [150, 2, 300]),
    ([[10, 10, 8], [9, 8, 1], [9, 7, 4]], [10, 1, 7]),
    ([[10, 10, 8, 11], [9, 8, 1, 1], [9, 7, 4, 10]], [10, 1, 4]),
    ([[10, inf, inf], [inf, inf, 1], [inf, 7, inf]], [10, 1, 7]),
]


def picked(cost: Tensor, **options: bool) -> list[float]:
    """The costs of the matched pairs, row by row; the total is their sum."""
    out = linear_assignment(cost[None], **options)
    match = out.match[0]
    assert out.status.item() == 0
    found = [cost[i, j].item() for i, j in enumerate(match.tolist()) if j >= 0]
    assert out.total.item() == sum(found)
    return found


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("cost", "expected"), SCIPY)
def test_scipys_matrices(cost: list[list[float]], expected: list[float], sign: int) -> None:
    matrix, wanted = sign * torch.tensor(cost), [sign * x for x in expected]
    options = {"maximize": sign == -1}
    assert picked(matrix, **options) == wanted
    assert sorted(picked(matrix.T, **options)) == sorted(wanted)


def test_scipys_edges() -> None:
    assert linear_assignment(torch.ones(1, 8, 8)).match.tolist() == [list(range(8))]
    for shape in ((1, 0, 0), (1, 2, 0), (1, 0, 3)):
        out = linear_assignment(torch.empty(shape))
        assert out.match.tolist() == [[-1] * shape[1]]
    bad = torch.eye(3)
    bad[:, 0] = inf
    assert linear_assignment(bad[None]).status.tolist() == [INFEASIBLE]
    for value in (torch.nan, -inf):
        bad = torch.diag(torch.tensor([1.0, value, 1.0]))
        assert linear_assignment(bad[None]).status.tolist() == [INVALID]
    assert picked(torch.tensor([[1.0, 2, 3], [4, 5, 6]])) == [1, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_torch_linear_assignments_example(dtype: torch.dtype) -> None:
    cost = torch.tensor([[8, 4, 7], [5, 2, 3], [9, 6, 7], [9, 4, 8]], dtype=dtype)
    assert linear_assignment(cost[None]).match.tolist() == [[0, 2, -1, 1]]


# ---- boxes: torchvision, fvcore, TensorFlow Addons

INT_BOXES = [[0, 0, 100, 100], [0, 0, 50, 50], [200, 200, 300, 300], [0, 0, 25, 25]]
FLOAT_BOXES = [
    [285.3538, 185.5758, 1193.5110, 851.4551],
    [285.1472, 188.7374, 1192.4984, 851.0669],
    [279.2440, 197.9812, 1189.4746, 849.2019],
]
DISTANCE = [[1, 0.1875, -0.4444], [0.1875, 1, -0.5625], [-0.4444, -0.5625, 1], [-0.0781, 0.1875, -0.6267]]
TORCHVISION = {
    "iou": [[1, 0.25, 0], [0.25, 1, 0], [0, 0, 1], [0.0625, 0.25, 0]],
    "giou": [[1, 0.25, -0.7778], [0.25, 1, -0.8611], [-0.7778, -0.8611, 1], [0.0625, 0.25, -0.8819]],
    "diou": DISTANCE,
    "ciou": DISTANCE,
}
NEAR = [[1, 0.9933, 0.9673], [0.9933, 1, 0.9737], [0.9673, 0.9737, 1]]


@pytest.mark.parametrize("kind", TORCHVISION)
def test_torchvisions_boxes(kind: str) -> None:
    for dtype in (torch.int16, torch.int32, torch.int64, torch.float32):
        boxes = torch.tensor(INT_BOXES, dtype=dtype)
        found = pairwise_iou(boxes, boxes[:3], kind=kind)
        torch.testing.assert_close(found, torch.tensor(TORCHVISION[kind]), rtol=0, atol=1e-4)
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.float32, 1e-3)):
        boxes = torch.tensor(FLOAT_BOXES, dtype=dtype)
        found = pairwise_iou(boxes, boxes, kind=kind)
        torch.testing.assert_close(found, torch.tensor(NEAR), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_losses_of_torchvision_and_fvcore(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[-1, -1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 2], [1, 1, 2, 2]], dtype=dtype)
    loss = {kind: 1 - pairwise_iou(boxes, boxes, kind=kind) for kind in ("giou", "diou", "ciou")}
    giou = loss["giou"]
    assert [giou[0, 0], giou[0, 1], giou[1, 2], giou[1, 3]] == pytest.approx([0, 0.75, 1, 1.5], abs=1e-6)
    for kind in ("diou", "ciou"):
        assert loss[kind][0].tolist() == pytest.approx([0, 0.8125, 1.1923, 1.25], abs=5e-5)
        assert (loss[kind][1, 2] + loss[kind][1, 3]).item() == pytest.approx(2.45, abs=5e-5)


def test_tensorflow_addons_giou() -> None:
    a = torch.tensor([[4.0, 3, 7, 5], [5, 6, 10, 7]])
    b = torch.tensor([[3.0, 4, 6, 8], [14, 14, 15, 15]])
    iou, giou = (1 - pairwise_iou(a, b, kind=kind).diagonal() for kind in ("iou", "giou"))
    torch.testing.assert_close(iou, torch.tensor([14 / 16, 1.0]))
    torch.testing.assert_close(giou, torch.tensor([1.07500000298023224, 1.9333333373069763]))


# ---- listwise losses: allRank, TensorFlow Ranking


def ranked(score: list[float], reward: list[float], mask: list[bool] | None = None, **options: object) -> float:
    chosen = None if mask is None else torch.tensor([mask])
    scores = torch.tensor([score], dtype=torch.float32)
    loss = listwise_loss(scores, torch.tensor([reward]), mask=chosen, beta=1.0, **options)  # type: ignore[arg-type]
    return loss.item()


def bce(*gaps: float) -> list[float]:
    return [log(1 + exp(-gap)) for gap in gaps]


def test_allranks_listmle_and_ranknet() -> None:
    padded = [True, True, False]
    assert ranked([0.5, 0.3, 0.5], [1, 0, -1], padded, kind="listmle") == pytest.approx(0.5981389284133911)
    plain = {"kind": "perpo", "gamma": 0.0}
    (one,), (turned,) = bce(0.3), bce(-0.3)
    assert ranked([0.5, 0.2], [1, 0], **plain) == pytest.approx(one)
    assert ranked([0.2, 0.5], [1, 0], **plain) == pytest.approx(turned)
    assert ranked([0.5, 0.2, 0.1], [1, 0, 0], **plain) == pytest.approx(sum(bce(0.3, 0.4)) / 2)
    assert ranked([0.2, 0.5], [0, 1], **plain) == pytest.approx(one)
    assert ranked([0.2, 0.5], [0, 2], **plain) == pytest.approx(one)
    assert ranked([0.5, 0.2, 0.66], [1, 0, -1], padded, **plain) == pytest.approx(one)


def test_allranks_ranknet_weighted_by_the_gap() -> None:
    """It divides by the pairs, PerPO by their weights: 1, 2 and 1 of gap 1, 2 and 1."""
    losses = bce(0.3, 0.4, 0.1)
    theirs = (1 * losses[0] + 2 * losses[1] + 1 * losses[2]) / 3
    ours = ranked([0.5, 0.2, 0.1], [2, 1, 0], kind="perpo", gamma=1.0)
    assert ours * 4 / 3 == pytest.approx(theirs)


LN2, LN3 = log(2), log(3)


@pytest.mark.parametrize(
    ("score", "reward", "expected"),
    [
        ([0, LN3, LN2], [0, 2, 1], -(log(3 / 6) + log(2 / 3))),
        ([0, LN2, LN3], [1, 0, 2], -(log(3 / 6) + log(1 / 3))),
        ([1.0, 3, 2], [0, 0.5, 1], log(exp(1) + exp(3) + exp(2)) - 2 + log(exp(1) + exp(3)) - 3),
    ],
)
def test_tensorflow_rankings_listmle(score: list[float], reward: list[float], expected: float) -> None:
    assert ranked(score, reward, kind="listmle") == pytest.approx(expected, abs=1e-5)


def test_tensorflow_rankings_pairwise_logistic() -> None:
    """Its sum over pairs; ours is their mean. Lists of its test, of its ragged one, and with a label to be ignored."""
    plain = {"kind": "perpo", "gamma": 0.0}
    first, second = sum(bce(2 - 1, 2 - 3)), sum(bce(3 - 1, 3 - 2))
    assert 2 * ranked([1, 3, 2], [0, 0, 1], **plain) == pytest.approx(first, abs=1e-5)
    assert 2 * ranked([1, 2, 3], [0, 0, 2], **plain) == pytest.approx(second, abs=1e-5)
    ragged = 2 * ranked([1, 3, 2], [0, 0, 1], **plain) + ranked([3, 2], [0, 2], **plain)
    assert ragged == pytest.approx(2.9397852, abs=1e-5)
    assert ranked([1, 3, 2], [0, -1, 1], [True, False, True], **plain) == pytest.approx(log(1 + exp(-1)), abs=1e-5)


# ---- cross-entropy: what PyTorch's tests and documentation state


@pytest.mark.parametrize("v", [2, 7])
def test_uniform_logits_cost_log_v_however_smoothed(v: int) -> None:
    for smoothing, reduction in product((0.0, 0.3, 1.0), ("mean", "none")):
        loss = cross_entropy(torch.zeros(3, v), torch.arange(3) % v, label_smoothing=smoothing, reduction=reduction)
        torch.testing.assert_close(loss, torch.full_like(loss, log(v)))


def test_sure_logits_and_ignored_rows() -> None:
    assert cross_entropy(torch.tensor([[20.0, 0.0]]), torch.tensor([0])) == pytest.approx(0.0, abs=3e-9)
    both = torch.tensor([[100.0, 0.0], [10.0, 10.0]])
    assert cross_entropy(both, torch.tensor([0, 1]), ignore_index=1) == pytest.approx(0, abs=1e-40)
    assert cross_entropy(torch.tensor([[100.0, 0.0]]), torch.tensor([1])) == 100
    smoothed = cross_entropy(torch.tensor([[100.0, 0.0]]), torch.tensor([0]), label_smoothing=0.1)
    assert smoothed == pytest.approx(0.1 / 2 * 100)
