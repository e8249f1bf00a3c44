"""The cases of other libraries' own tests, as the numbers that they assert.

SciPy (``scipy.sparse.csgraph``'s and ``scipy.optimize``'s assignment), torch-linear-assignment, DETR (its matcher),
torchvision, fvcore and detectron2 (boxes), TensorFlow Addons (GIoU), allRank and TensorFlow Ranking (listwise losses),
TRL (DPO), PyTorch's documentation, QuACK and Liger (cross-entropy). Advantages and policy losses are in
``test_peers_policy_values``. Code of theirs that runs on a CPU is called in ``test_parity`` and ``integrations``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from math import exp, inf, log, tanh

import pytest
import torch
from torch import Tensor

from fastrl_kernels import cross_entropy, linear_assignment, linear_cross_entropy, listwise_loss, pairwise_iou
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


def picked(cost: Tensor, *, maximize: bool = False) -> list[float]:
    """The costs of the matched pairs, row by row; the total is their sum."""
    out = linear_assignment(cost[None], maximize=maximize)
    match = out.match[0]
    assert out.status.item() == 0
    found = [cost[i, j].item() for i, j in enumerate(match.tolist()) if j >= 0]
    assert out.total.item() == sum(found)
    return found


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("cost", "expected"), SCIPY)
def test_scipys_matrices(cost: list[list[float]], expected: list[float], sign: int) -> None:
    matrix, wanted = sign * torch.tensor(cost), [sign * x for x in expected]
    assert picked(matrix, maximize=sign == -1) == wanted
    assert sorted(picked(matrix.T, maximize=sign == -1)) == sorted(wanted)


def test_scipys_edges() -> None:
    assert linear_assignment(torch.ones(1, 8, 8)).match.tolist() == [list(range(8))]
    for shape in ((1, 0, 0), (1, 2, 0), (1, 0, 3), (1, 0, 2), (1, 3, 0)):
        out = linear_assignment(torch.empty(shape))
        assert out.match.tolist() == [[-1] * shape[1]]
    bad = torch.eye(3)
    bad[:, 0] = inf
    assert linear_assignment(bad[None]).status.tolist() == [INFEASIBLE]
    for diagonal in ([1.0, torch.nan, 1.0], [torch.nan, 1.0, 1.0], [1.0, -inf, 1.0]):
        bad = torch.diag(torch.tensor(diagonal))
        assert linear_assignment(bad[None]).status.tolist() == [INVALID]
    assert picked(torch.tensor([[1.0, 2, 3], [4, 5, 6]])) == [1, 5]
    with pytest.raises(ValueError, match="cost"):
        linear_assignment(torch.tensor([1.0, 2, 3]))


def graph(edges: list[list[float]]) -> Tensor:
    """The costs of a sparse graph: no edge where there is a 0."""
    cost = torch.tensor(edges, dtype=torch.float32)
    return cost.masked_fill(cost == 0, inf)


@pytest.mark.parametrize(
    "edges",
    [
        [[1, 1, 1], [1, 0, 0], [1, 0, 0]],
        [[1, 1, 1], [0, 0, 1], [0, 0, 1]],
        [[1, 0, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0]],
        [[1, 0, 0], [2, 0, 0]],
        [[0, 1, 0], [0, 2, 0]],
        [[1, 0], [2, 0], [5, 0]],
    ],
)
def test_scipys_graphs_without_a_full_matching(edges: list[list[float]]) -> None:
    assert linear_assignment(graph(edges)[None]).status.tolist() == [INFEASIBLE]


# csgraph's regression test of its issue 17269: rows 0 to 8 have one edge of 0.001 to column 13 + row
ISSUE_17269 = [
    {1: 0.11687445, 4: 0.01319788, 5: 0.07509257, 9: 0.74228317},
    {3: 0.81087935},
    {4: 0.8408466, 9: 0.01194389},
    {1: 0.82994211, 5: 0.11468516, 9: 0.11173505},
    {0: 0.18796507, 2: 0.04002318, 8: 0.75883335},
    {2: 0.71545464, 8: 0.02748488},
    {0: 0.78470564, 8: 0.14829198},
    {1: 0.10870609, 5: 0.8918677, 9: 0.06306644},
    {12: 0.63844085},
    {6: 0.7442354},
    {7: 0.09850549, 10: 0.18638258, 11: 0.2769244},
    {7: 0.73182464, 10: 0.46443561, 11: 0.38589284},
    {0: 0.29510278, 8: 0.09666032},
]


def test_scipys_large_graph_without_a_full_matching() -> None:
    cost = torch.full((22, 22), inf)
    for row, edges in enumerate([{13 + row: 0.001} for row in range(9)] + ISSUE_17269):
        for column, value in edges.items():
            cost[row, column] = value
    assert linear_assignment(cost[None]).status.tolist() == [INFEASIBLE]


EDGES = [11, 12, 19, 22, 23, 5, 22, 3, 8, 10, 5, 6, 11, 12, 13, 5, 13, 14, 20, 22, 3, 15, 3, 13, 14] * 2
ROW_ENDS = [0, 5, 7, 10, 10, 15, 20, 22, 22, 23, 25, 30, 32, 35, 35, 40, 45, 47, 47, 48, 50]


def test_scipys_maximum_matchings() -> None:
    """A largest matching is an assignment in which an edge costs 0 and any other pair 1 (csgraph's issue 11458)."""
    cost = torch.ones(20, 25)
    for row, (first, last) in enumerate(pairwise(ROW_ENDS)):
        cost[row, EDGES[first:last]] = 0
    for turned in (cost, cost.T):
        assert linear_assignment(turned[None]).total.item() == 20 - 13
    assert linear_assignment(torch.tensor([[[0, 0], [0, 1]]])).match.tolist() == [[1, 0]]
    assert linear_assignment(torch.tensor([[[0, 0, 1], [1, 1, 0]]])).total.item() == 0
    assert linear_assignment(torch.tensor([[[0, 0], [0, 1], [1, 0]]])).total.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_torch_linear_assignments_example(dtype: torch.dtype) -> None:
    cost = torch.tensor([[8, 4, 7], [5, 2, 3], [9, 6, 7], [9, 4, 8]], dtype=dtype)
    assert linear_assignment(cost[None]).match.tolist() == [[0, 2, -1, 1]]
    assert linear_assignment(torch.empty(0, 5, 5, dtype=dtype)).match.shape == (0, 5)


def test_detrs_matcher() -> None:
    """100 queries, 15 objects: each object once, the same in every copy of a batch; none where there are no objects."""
    cost = torch.rand(1, 100, 15, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
    once, twice = linear_assignment(cost[:1]).match, linear_assignment(cost).match
    assert sorted(once[once >= 0].tolist()) == list(range(15))
    assert twice.tolist() == [*once.tolist(), *once.tolist()]
    counts = torch.tensor([15, 0])
    found = linear_assignment(cost, n_cols=counts).match
    assert (found >= 0).sum(1).tolist() == [15, 0]


# ---- boxes: torchvision, fvcore, detectron2, TensorFlow Addons

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
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.float32, 1e-3), (torch.float64, 1e-3)):
        boxes = torch.tensor(FLOAT_BOXES, dtype=dtype)
        found = pairwise_iou(boxes, boxes, kind=kind)
        torch.testing.assert_close(found, torch.tensor(NEAR), rtol=0, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_losses_of_torchvision_and_fvcore(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[-1, -1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 2], [1, 1, 2, 2]], dtype=dtype)
    loss = {kind: 1 - pairwise_iou(boxes, boxes, kind=kind) for kind in ("giou", "diou", "ciou")}
    giou = loss["giou"]
    assert [giou[0, 0], giou[0, 1], giou[1, 2], giou[1, 3]] == pytest.approx([0, 0.75, 1, 1.5], abs=1e-6)
    for kind in ("diou", "ciou"):
        assert loss[kind][0].tolist() == pytest.approx([0, 0.8125, 1.1923, 1.25], abs=5e-5)
        assert (loss[kind][1, 2] + loss[kind][1, 3]).item() == pytest.approx(2.45, abs=5e-5)


@pytest.mark.parametrize("kind", TORCHVISION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_boxes_have_an_empty_loss_and_a_gradient(kind: str, dtype: torch.dtype) -> None:
    a, b = (torch.empty(0, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    loss = 1 - pairwise_iou(a, b, kind=kind)
    assert loss.numel() == 0
    assert [x.shape for x in torch.autograd.grad(loss.sum(), [a, b])] == [(0, 4), (0, 4)]


def test_detectron2s_boxes() -> None:
    whole = torch.tensor([[0.0, 0, 1, 1]] * 2)
    parts = [[0, 0, 1, 1], [0, 0, 0.5, 1], [0, 0, 1, 0.5], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.5, 0.5, 1.5, 1.5]]
    expected = torch.tensor([[1, 0.5, 0.5, 0.25, 0.25, 0.25 / (2 - 0.25)]] * 2)
    torch.testing.assert_close(pairwise_iou(whole, torch.tensor(parts)), expected)


def test_tensorflow_addons_giou() -> None:
    a = torch.tensor([[4.0, 3, 7, 5], [5, 6, 10, 7]])
    b = torch.tensor([[3.0, 4, 6, 8], [14, 14, 15, 15]])
    iou, giou = (1 - pairwise_iou(a, b, kind=kind).diagonal() for kind in ("iou", "giou"))
    torch.testing.assert_close(iou, torch.tensor([14 / 16, 1.0]))
    torch.testing.assert_close(giou, torch.tensor([1.07500000298023224, 1.9333333373069763]))


# ---- listwise losses: allRank, TensorFlow Ranking, TRL's DPO


def ranked(score: Sequence[float], reward: Sequence[float], mask: list[bool] | None = None, **options: object) -> float:
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


@pytest.mark.parametrize(("power", "weights"), [(1, (1, 2, 1)), (2, (3, 4, 1))])
def test_allranks_ranknet_weighted_by_the_gap(power: int, weights: tuple[int, ...]) -> None:
    """Of the labels 2, 1, 0 or of their squares. It divides by the pairs, PerPO by their weights."""
    theirs = sum(w * x for w, x in zip(weights, bce(0.3, 0.4, 0.1), strict=True)) / 3
    ours = ranked([0.5, 0.2, 0.1], [2**power, 1, 0], kind="perpo", gamma=1.0)
    assert ours * sum(weights) / 3 == pytest.approx(theirs)


LN2, LN3 = log(2), log(3)


@pytest.mark.parametrize(
    ("score", "reward", "expected"),
    [
        ([0, LN3, LN2], [0, 2, 1], -(log(3 / 6) + log(2 / 3))),
        ([0, LN2, LN3], [1, 0, 2], -(log(3 / 6) + log(1 / 3))),
        ([1.0, 3, 2], [0, 0.5, 1], log(exp(1) + exp(3) + exp(2)) - 2 + log(exp(1) + exp(3)) - 3),
        ([LN2, 0, LN3], [0, 0, 1], -(log(3 / 6) + log(2 / 3))),  # ties: its draw of an order is our order of the items
        ([1.0, 3, 2], [0, 0, 1], 3.534534),
        ([1.0, 3], [0, 2], 0.126928),
    ],
)
def test_tensorflow_rankings_listmle(score: list[float], reward: list[float], expected: float) -> None:
    assert ranked(score, reward, kind="listmle") == pytest.approx(expected, abs=1e-5)


def test_tensorflow_rankings_listmle_of_several_lists() -> None:
    scores = torch.tensor([[0, LN3, LN2], [0, LN2, LN3]])
    first, second = -(log(3 / 6) + log(2 / 3)), -(log(3 / 6) + log(1 / 3))
    losses = listwise_loss(scores, torch.tensor([[0.0, 2, 1], [1, 0, 2]]), kind="listmle", beta=1.0)
    assert losses.mean().item() == pytest.approx((first + second) / 2, abs=1e-5)
    assert (losses @ torch.tensor([2.0, 1])).item() / 2 == pytest.approx((2 * first + second) / 2, abs=1e-5)
    masked = ranked([0, LN2, LN3], [0, 0, 1], [True, False, True], kind="listmle")
    assert masked == pytest.approx(-log(3 / 4), abs=1e-5)
    ragged = ranked([3, 1, 2], [0, 0, 1], kind="listmle") + ranked([3, 2], [0, 2], kind="listmle")
    assert ragged == pytest.approx(2.8477957, abs=1e-5)


def test_tensorflow_rankings_pairwise_logistic() -> None:
    """Its sum over pairs; ours is their mean. Lists of its test, of its ragged one, and with a label to be ignored."""
    plain = {"kind": "perpo", "gamma": 0.0}
    first, second = sum(bce(2 - 1, 2 - 3)), sum(bce(3 - 1, 3 - 2))
    assert 2 * ranked([1, 3, 2], [0, 0, 1], **plain) == pytest.approx(first, abs=1e-5)
    assert 2 * ranked([1, 2, 3], [0, 0, 2], **plain) == pytest.approx(second, abs=1e-5)
    ragged = 2 * ranked([1, 3, 2], [0, 0, 1], **plain) + ranked([3, 2], [0, 2], **plain)
    assert ragged == pytest.approx(2.9397852, abs=1e-5)
    assert ranked([1, 3, 2], [0, -1, 1], [True, False, True], **plain) == pytest.approx(log(1 + exp(-1)), abs=1e-5)
    for score, reward, each in (([1, 3, 2], [0, 0, 1], 0.813262), ([1, 3], [0, 2], 0.126928)):
        assert ranked(score, reward, **plain) == pytest.approx(each, abs=1e-5)


def test_tensorflow_rankings_pairwise_logistic_of_several_lists() -> None:
    """Means over all pairs, weighted by list, and with an item left out: from our mean of each list's pairs."""
    scores, rewards = torch.tensor([[1.0, 3, 2], [1, 2, 3]]), torch.tensor([[0.0, 0, 1], [0, 0, 2]])
    plain = {"kind": "perpo", "gamma": 0.0, "beta": 1.0}
    losses = listwise_loss(scores, rewards, **plain)  # type: ignore[arg-type]
    assert losses.mean().item() == pytest.approx(sum(bce(1, -1, 2, 1)) / 4, abs=1e-5)
    weighted = 2 * losses @ torch.tensor([1.0, 2]) / 6
    assert weighted.item() == pytest.approx((sum(bce(1, -1)) + 2 * sum(bce(1, 2))) / 6, abs=1e-5)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    losses = listwise_loss(scores, torch.tensor([[1.0, 0, 0], [0, 0, 2]]), mask=mask, **plain)  # type: ignore[arg-type]
    assert (losses @ torch.tensor([1.0, 2])).item() / 3 == pytest.approx(sum(bce(-1, 2, 1)) / 3, abs=1e-5)


# log-probs of its chosen and rejected answers, then of the reference
TRL_DPO = [((410.0, 810.5), (-610.0, 110.6)), ((410.0, 95.5), (-610.0, 5.5)), ((0.1, 0.2), (-0.1, 0.5))]


@pytest.mark.parametrize(("policy", "reference"), TRL_DPO)
@pytest.mark.parametrize("turned", [False, True])
def test_trls_extreme_dpo_pairs_are_finite(
    policy: tuple[float, float], reference: tuple[float, float], turned: bool
) -> None:
    score = (torch.tensor([policy]) - torch.tensor([reference])).requires_grad_()
    reward = torch.tensor([[0.0, 1.0] if turned else [1.0, 0.0]])
    loss = listwise_loss(score, reward, kind="perpo", gamma=0.0, beta=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), score)
    gap = 0.1 * (policy[0] - reference[0] - policy[1] + reference[1]) * (-1 if turned else 1)
    assert loss.item() == pytest.approx(log(1 + exp(-gap)), rel=1e-5)
    assert gradient.isfinite().all()


# ---- cross-entropy: what PyTorch's tests and documentation state, QuACK, Liger


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quacks_extreme_values(dtype: torch.dtype) -> None:
    target = torch.tensor([0, 5, 511, 1023])
    for level in (10.0, -10.0):
        loss = cross_entropy(torch.full((4, 1024), level, dtype=dtype), target, reduction="none")
        torch.testing.assert_close(loss, torch.full((4,), log(1024)), rtol=1e-6, atol=0)
    sure = torch.full((4, 1024), -10.0, dtype=dtype).scatter(1, target[:, None], 10.0)
    loss = cross_entropy(sure, target, reduction="none")
    torch.testing.assert_close(loss, torch.full((4,), 1023 * exp(-20)), rtol=1e-4, atol=0)


def test_quacks_invariances() -> None:
    """Logits raised by 100; class weights of 1; the last class ignored, with and without weights."""
    logits, target = torch.randn(4, 64), torch.tensor([0, 3, 63, 63])
    loss = cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(cross_entropy(logits + 100, target, reduction="none"), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross_entropy(logits, target, torch.ones(64), reduction="none"), loss)
    for weight in (None, torch.ones(64)):
        ignored = cross_entropy(logits, target, weight, reduction="none", ignore_index=63)
        assert ignored.tolist() == [*loss[:2].tolist(), 0, 0]


LIGER = [  # z-loss, smoothing, softcap, ignored class, reduction
    (1e-4, 0.0, None, -100, "mean"),
    (1e-5, 0.0, None, -123, "none"),
    (0.0, 0.1, None, 2, "mean"),
    (1e-4, 0.1, None, 42, "mean"),
    (1e-5, 0.2, None, -42, "sum"),
    (1e-4, 0.1, 30.0, -100, "none"),
    (1e-5, 0.2, 40.0, 42, "sum"),
]


@pytest.mark.parametrize(("z_loss", "smoothing", "softcap", "ignored", "reduction"), LIGER)
def test_ligers_settings_on_equal_logits(
    z_loss: float, smoothing: float, softcap: float | None, ignored: int, reduction: str
) -> None:
    """The settings are its, the logits ours: equal ones, whose loss has a closed form in each of them."""
    v, level = 45, 25.0
    capped = level if softcap is None else softcap * tanh(level / softcap)
    each = log(v) + z_loss * (capped + log(v)) ** 2
    loss = linear_cross_entropy(
        torch.full((3, 1), level), torch.ones(v, 1), torch.tensor([0, ignored, 44]), z_loss=z_loss,
        label_smoothing=smoothing, softcap=softcap, ignore_index=ignored, reduction=reduction,
    )  # fmt: skip
    expected = torch.tensor({"none": [each, 0, each], "mean": each, "sum": 2 * each}[reduction])
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("ignored", [2, -123])
def test_ligers_targets_out_of_bounds(ignored: int) -> None:
    target = torch.tensor([0, ignored, 8, 15])
    with pytest.raises(ValueError, match=r"target: row 2 is 8, expected 0\.\.7"):
        cross_entropy(torch.randn(4, 8), target, ignore_index=ignored)
