"""detection_reward against an independent oracle in NumPy and SciPy, on every path and for any input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fastrl_kernels import _native
from fastrl_kernels.detection_reward import DetectionReward, detection_reward, detection_reward_reference

PATHS = ["eager"] if _native.library() is None else ["eager", "native"]
PARTS = ("location", "label", "precision", "recall", "f1", "missing")


def score(path: str, *args: Tensor, **options: Any) -> DetectionReward:
    return detection_reward_reference(*args, **options) if path == "eager" else detection_reward(*args, **options)


def oracle_quality(p: np.ndarray, g: np.ndarray, metric: str, scale: float) -> float:
    if metric == "point":
        return max(0.0, 1 - math.hypot(p[0] - g[0], p[1] - g[1]) / scale)
    if p[2] <= p[0] or p[3] <= p[1] or g[2] <= g[0] or g[3] <= g[1]:
        return 0.0
    w, h = min(p[2], g[2]) - max(p[0], g[0]), min(p[3], g[3]) - max(p[1], g[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((p[2] - p[0]) * (p[3] - p[1]) + (g[2] - g[0]) * (g[3] - g[1]) - inter)


def oracle(
    p: np.ndarray,
    g: np.ndarray,
    labels: tuple[np.ndarray, np.ndarray] | None,
    metric: str,
    matching: str,
    threshold: float,
    scale: float,
) -> dict[str, float]:
    table = np.array([[oracle_quality(a, b, metric, scale) for b in g] for a in p]).reshape(len(p), len(g))
    rows, cols = linear_sum_assignment(table, maximize=True)
    if matching == "sequence":
        rows = cols = np.arange(min(len(p), len(g)))
    pairs = [(i, j) for i, j in zip(rows, cols, strict=True) if table[i, j] > 0]
    hits = sum(table[i, j] >= threshold for i, j in pairs)
    same = sum(labels is None or labels[0][i] == labels[1][j] for i, j in pairs)
    if len(p) == len(g) == 0:
        return {**dict.fromkeys(PARTS, 1.0), "missing": 0.0}
    return {
        "location": float(np.mean([table[i, j] for i, j in pairs])) if pairs else 0.0,
        "label": same / len(pairs) if pairs else 0.0,
        "precision": hits / len(p) if len(p) else 0.0,
        "recall": hits / len(g) if len(g) else 0.0,
        "f1": 2 * hits / (len(p) + len(g)),
        "missing": (hits - len(g)) / len(g) if len(g) else 0.0,
    }


def answers(problems: int, n: int, m: int, metric: str, rng: np.random.Generator, size: float = 100.0) -> list[Tensor]:
    """Truths, predictions near some of them or anywhere, counts (some 0, some beyond the padding) and labels."""
    gt = rng.random((problems, m, 4)) * 0.7
    gt[..., 2:] = gt[..., :2] + 0.05 + gt[..., 2:] * 0.5
    pred = rng.random((problems, n, 4)) * 0.7
    pred[..., 2:] = pred[..., :2] + 0.05 + pred[..., 2:] * 0.5
    k = min(n, m) // 2 + 1 if m else 0
    source = rng.permuted(np.tile(np.arange(m), (problems, 1)), axis=1)[:, :k]
    near = np.take_along_axis(gt, source[:, :, None], 1) + rng.normal(size=(problems, k, 4)) * 0.03
    pred[:, : near.shape[1]] = near[:, :n]
    items = [torch.from_numpy(x * size).float()[..., : 4 if metric == "iou" else 2] for x in (pred, gt)]
    counts = [torch.from_numpy(rng.integers(-1, x + 3, problems)) for x in (n, m)]
    counts[0][: problems // 2], counts[1][: problems // 2] = n, m
    labels = [torch.from_numpy(rng.integers(0, 3, (problems, x))) for x in (n, m)]
    return [*items, *counts, *labels]


def check_against_oracle(path: str, data: list[Tensor], labelled: bool, **options: Any) -> None:
    pred, gt, n_pred, n_gt, pred_label, gt_label = data
    given_labels = {"pred_label": pred_label, "gt_label": gt_label} if labelled else {}
    out = score(path, pred, gt, n_pred, n_gt, **given_labels, **options)
    for b in range(len(pred)):
        p = pred[b, : max(0, int(n_pred[b]))].double().numpy()
        g = gt[b, : max(0, int(n_gt[b]))].double().numpy()
        labels = (pred_label[b].numpy(), gt_label[b].numpy()) if labelled else None
        want = oracle(p, g, labels, **options)
        for name in PARTS:
            got = getattr(out, name)[b].item()
            assert abs(got - want[name]) < 2e-5, (b, name, got, want[name])
        matched = out.match[b] >= 0
        assert not matched[len(p) :].any()
        assert torch.equal(matched, out.quality[b] > 0)
        for i in matched.nonzero()[:, 0].tolist():
            j = int(out.match[b, i])
            assert (
                abs(out.quality[b, i].item() - oracle_quality(p[i], g[j], options["metric"], options["scale"])) < 2e-5
            )
        chosen = out.match[b][matched]
        assert chosen.unique().numel() == chosen.numel()


OPTIONS = [
    {"metric": "iou", "matching": "optimal", "threshold": 0.5, "scale": 1.0},
    {"metric": "iou", "matching": "sequence", "threshold": 0.3, "scale": 1.0},
    {"metric": "iou", "matching": "optimal", "threshold": 0.0, "scale": 1.0},
    {"metric": "point", "matching": "optimal", "threshold": 0.9, "scale": 100 * math.sqrt(2)},
    {"metric": "point", "matching": "optimal", "threshold": 0.5, "scale": 20.0},
    {"metric": "point", "matching": "sequence", "threshold": 0.5, "scale": 100.0},
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o['metric']}-{o['matching']}-{o['threshold']}")
def test_equals_the_oracle(path: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for n, m in [(7, 5), (5, 9), (1, 6), (6, 1), (30, 25)]:
        problems = 40 if n < 30 else 6
        for labelled in (False, True):
            check_against_oracle(path, answers(problems, n, m, options["metric"], rng), labelled, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o['metric']}-{o['matching']}-{o['threshold']}")
def test_kernel_equals_the_oracle(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    for n, m in [(6, 5), (4, 7), (1, 3)]:
        check_against_oracle("kernel", answers(6, n, m, options["metric"], rng), True, **options)
    check_against_oracle("kernel", answers(1, 35, 20, options["metric"], rng), False, **options)


def parts_of(out: DetectionReward) -> list[float]:
    return [round(getattr(out, name)[0].item(), 6) for name in PARTS]


def boxes(*items: tuple[float, ...]) -> Tensor:
    return torch.tensor(items, dtype=torch.float32).reshape(1, len(items), 4)


def count(n: int) -> Tensor:
    return torch.tensor([n])


@pytest.mark.parametrize("path", PATHS)
def test_worked_example(path: str) -> None:
    # IoU 1 with truth 0 (label right), 8/24 = 1/3 with truth 1 (label wrong), a stray box; truth 2 is missed
    pred = boxes((0, 0, 4, 4), (12, 10, 16, 14), (40, 40, 44, 44), (0, 0, 0, 0))
    gt = boxes((0, 0, 4, 4), (10, 10, 14, 14), (20, 20, 24, 24))
    labels = {"pred_label": torch.tensor([[1, 2, 3, 0]]), "gt_label": torch.tensor([[1, 1, 3]])}
    out = score(path, pred, gt, count(3), count(3), **labels)
    assert out.match.tolist() == [[0, 1, -1, -1]]
    assert parts_of(out) == [round(2 / 3, 6), 0.5, round(1 / 3, 6), round(1 / 3, 6), round(1 / 3, 6), round(-2 / 3, 6)]
    out = score(path, pred, gt, count(3), count(3), threshold=0.3)
    assert parts_of(out)[1:] == [1.0, *[round(2 / 3, 6)] * 3, round(-1 / 3, 6)]


@pytest.mark.parametrize("path", PATHS)
def test_nothing_predicted_or_nothing_there(path: str) -> None:
    one = boxes((0, 0, 4, 4))
    none = one[:, :0]
    for pred, gt, want in (
        (one, one, [1, 1, 1, 1, 1, 0]),
        (none, none, [1, 1, 1, 1, 1, 0]),
        (none, one, [0, 0, 0, 0, 0, -1]),
        (one, none, [0, 0, 0, 0, 0, 0]),
    ):
        n, m = pred.shape[1], gt.shape[1]
        assert parts_of(score(path, pred, gt, count(n), count(m))) == want
        assert parts_of(score(path, pred, gt, count(n), count(m), matching="sequence")) == want
        padded = torch.cat((pred, one, one), 1), torch.cat((gt, one), 1)
        assert parts_of(score(path, *padded, count(n), count(m))) == want
    empty = score(path, torch.empty(0, 3, 4), torch.empty(0, 2, 4), count(0)[:0], count(0)[:0])
    assert empty.match.shape == (0, 3)


@pytest.mark.parametrize("path", PATHS)
def test_optimal_matching_gives_up_a_truth_only_for_a_greater_sum(path: str) -> None:
    # one prediction overlaps both truths; the other overlaps only the first: greedy would leave the second truth
    pred = boxes((0, 0, 10, 10), (-4, 0, 6, 10))
    gt = boxes((0, 0, 10, 10), (6, 0, 16, 10))
    out = score(path, pred, gt, count(2), count(2))
    assert out.match.tolist() == [[0, -1]]  # 1 + 0 beats 3/7 + 1/4
    gt = boxes((-1, 0, 9, 10), (4, 0, 14, 10))
    out = score(path, pred, gt, count(2), count(2))
    assert out.match.tolist() == [[1, 0]]  # 6/14 + 7/13 beats 9/11


@pytest.mark.parametrize("path", PATHS)
def test_duplicates_lower_precision_and_the_first_one_is_matched(path: str) -> None:
    pred = boxes(*[(0, 0, 4, 4)] * 4)
    out = score(path, pred, boxes((0, 0, 4, 4)), count(4), count(1))
    assert out.match.tolist() == [[0, -1, -1, -1]]
    assert parts_of(out) == [1, 1, 0.25, 1, 0.4, 0]


WILD = st.one_of(
    st.floats(width=32), st.floats(-5, 1005, width=32), st.sampled_from([0.0, 1e-45, 1e38, np.inf, np.nan])
)


@given(data=st.data())
def test_any_coordinates_and_counts(data: st.DataObject) -> None:
    coords = data.draw(st.sampled_from([4, 2]))
    n, m = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    pred, gt = (torch.from_numpy(data.draw(arrays(np.float32, (1, k, coords), elements=WILD))) for k in (n, m))
    if data.draw(st.booleans()) and n and m:
        pred[0, 0] = gt[0, 0]
    counts = [count(data.draw(st.integers(-3, 8))) for _ in range(2)]
    options = {"metric": "iou" if coords == 4 else "point", "scale": data.draw(st.sampled_from([1.0, 1e-3, 1414.2]))}
    outs = [score(path, pred, gt, *counts, **options) for path in PATHS]
    for out in outs:
        for name in PARTS[:-1]:
            assert 0 <= getattr(out, name).item() <= 1
        assert -1 <= out.missing.item() <= 0
        assert ((out.quality >= 0) & (out.quality <= 1)).all()
        assert torch.equal(out.match >= 0, out.quality > 0)
        assert (out.match < counts[1].clamp(0, m)).all()
        torch.testing.assert_close(out.quality.sum(), outs[0].quality.sum(), rtol=1e-5, atol=1e-6)
        for name in ("precision", "recall"):
            torch.testing.assert_close(getattr(out, name), getattr(outs[0], name))


@pytest.mark.parametrize("path", PATHS)
def test_worthless_boxes_match_nothing(path: str) -> None:
    nan, inf = math.nan, math.inf
    good = (0.0, 0.0, 4.0, 4.0)
    bad = [(nan, 0, 4, 4), (0, 0, 4, nan), (4, 4, 0, 0), (4, 0, 0, 4), (0, 0, 0, 4), (0, 0, inf, 4), (-inf, 0, inf, 4)]
    bad += [(0, 0, 1e30, 1e30), (0, 0, 1e-30, 1e-30)]
    for box in bad:
        assert parts_of(score(path, boxes(box, good), boxes(good), count(2), count(1)))[:4] == [1, 1, 0.5, 1]
        assert parts_of(score(path, boxes(good), boxes(box), count(1), count(1)))[:4] == [0, 0, 0, 0]
        assert parts_of(score(path, boxes(box), boxes(box), count(1), count(1)))[:4] == [0, 0, 0, 0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_and_strides(path: str, dtype: torch.dtype) -> None:
    data = answers(12, 6, 5, "iou", np.random.default_rng(2), size=16.0)
    pred, gt = (torch.cat((x, x), 1)[:, ::2].to(dtype) for x in data[:2])
    counts = data[2].int(), data[3].int()
    out = score(path, pred, gt, *counts)
    want = score("eager", pred.double(), gt.double(), *data[2:4])
    assert out.quality.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name in PARTS:
        torch.testing.assert_close(getattr(out, name).double(), getattr(want, name), rtol=1e-5, atol=1e-5)


def test_paths_agree_on_every_matching() -> None:
    rng = np.random.default_rng(3)
    for n, m in [(30, 30), (12, 20), (20, 12)]:
        pred, gt, n_pred, n_gt, *_ = answers(60, n, m, "iou", rng)
        pred[:, n // 2] = pred[:, 0]  # duplicates: ties
        a, b = (score(path, pred, gt, n_pred, n_gt) for path in (PATHS[0], PATHS[-1]))
        assert torch.equal(a.match, b.match)
        assert torch.equal(a.quality, b.quality)


def test_wrong_arguments_are_named() -> None:
    pred, gt, n = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="metric: expected one of iou, point, got 'giou'"):
        detection_reward(pred, gt, n, n, metric="giou")
    with pytest.raises(ValueError, match="matching: expected one of optimal, sequence, got 'greedy'"):
        detection_reward(pred, gt, n, n, matching="greedy")
    with pytest.raises(ValueError, match=r"pred: expected shape \[any, any, 2\], got \[2, 3, 4\]"):
        detection_reward(pred, gt, n, n, metric="point")
    with pytest.raises(ValueError, match=r"gt: expected shape \[2, any, 4\], got \[1, 5, 4\]"):
        detection_reward(pred, gt[:1], n, n)
    with pytest.raises(TypeError, match="gt: expected dtype float32, got float64"):
        detection_reward(pred, gt.double(), n, n)
    with pytest.raises(ValueError, match=r"n_gt: expected shape \[2\]"):
        detection_reward(pred, gt, n, n[:1])
    with pytest.raises(ValueError, match="pred_label, gt_label: give both or neither"):
        detection_reward(pred, gt, n, n, pred_label=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="scale: expected a positive finite number, got 0"):
        detection_reward(pred, gt, n, n, scale=0)


def check_operator(pred: Tensor, gt: Tensor, n_pred: Tensor, n_gt: Tensor, *labels: Tensor) -> None:
    op = torch.ops.fastrl.detection_reward.default
    torch.library.opcheck(op, (pred, gt, n_pred, n_gt, None, None, True, False, 0.5, 1.0))
    torch.library.opcheck(op, (pred, gt, n_pred, n_gt, *labels, True, True, 0.5, 1.0))


def test_operator_registration_and_compile() -> None:
    data = answers(4, 6, 5, "iou", np.random.default_rng(4))
    check_operator(*data)
    compiled = torch.compile(lambda *x: detection_reward(*x).f1 + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*data[:4]), detection_reward(*data[:4]).f1 + 1)


@pytest.mark.interpreter
def test_kernel_operator_and_odd_inputs() -> None:
    data = answers(2, 3, 2, "iou", np.random.default_rng(5))
    check_operator(*data)
    nan = boxes((0, 0, 4, 4), (math.nan, 0, 4, 4), (4, 4, 0, 0), (0, 0, math.inf, 4), (0, 0, 1e30, 1e30))
    out = detection_reward(nan.half(), nan.half(), count(5), count(5))
    assert parts_of(out)[:5] == [1, 1, 0.2, 0.2, 0.2]
    assert parts_of(detection_reward(nan[:, :0], nan, count(0), count(2))) == [0, 0, 0, 0, 0, -1]
    assert parts_of(detection_reward(nan, nan[:, :0], count(3), count(2))) == [0, 0, 0, 0, 0, 0]
    assert parts_of(detection_reward(nan, nan, count(0), count(-1))) == [1, 1, 1, 1, 1, 0]


@pytest.mark.gpu
def test_gpu_equals_eager_without_a_sync() -> None:
    rng = np.random.default_rng(6)
    for n, m in [(30, 30), (300, 40), (900, 100), (2000, 30)]:
        for metric in ("iou", "point"):
            data = answers(16, n, m, metric, rng)
            want = detection_reward_reference(*data[:4], metric=metric, scale=50.0)
            on_device = [x.cuda() for x in data[:4]]
            detection_reward(*on_device, metric=metric, scale=50.0)
            torch.cuda.set_sync_debug_mode("error")
            out = detection_reward(*on_device, metric=metric, scale=50.0)
            torch.cuda.set_sync_debug_mode("default")
            torch.testing.assert_close(out.quality.sum(1).cpu(), want.quality.sum(1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(out.location.cpu(), want.location, rtol=1e-5, atol=1e-5)
