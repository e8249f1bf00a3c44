"""pairwise_iou: values of torchvision's definitions, gradients against finite differences, defined at every edge."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastrl_kernels.pairwise_iou import KINDS, pairwise_iou, pairwise_iou_reference

A = [[0.0, 0, 4, 4], [1, 1, 3, 5], [10, 10, 12, 11]]
B = [[0.0, 0, 4, 4], [2, 2, 6, 4], [5, 0, 9, 8], [11, 10.5, 14, 13]]
# torchvision's box_iou, generalized_box_iou, distance_box_iou and complete_box_iou of A and B
VALUES = {
    "iou": [[1, 0.2, 0, 0], [0.3333333333, 0.1428571429, 0, 0], [0, 0, 0, 0.0555555556]],
    "giou": [
        [1, 0.0333333333, -0.3333333333, -0.8708791209],
        [0.2333333333, -0.1571428571, -0.3750000000, -0.9006410256],
        [-0.8636363636, -0.8888888889, -0.5584415584, -0.1944444444],
    ],
    "diou": [
        [1, 0.1038461540, -0.1999999999, -0.5624999998],
        [0.3089430895, 0.0452961675, -0.2031249998, -0.5968450477],
        [-0.5783018866, -0.5814917124, -0.3426470586, -0.0969444438],
    ],
    "ciou": [
        [1, 0.1017553755, -0.2016894606, -0.5625110594],
        [0.3064589137, 0.0178167803, -0.2031249998, -0.6012902248],
        [-0.5799913473, -0.5814917124, -0.3667649631, -0.0974293229],
    ],
}


def random_boxes(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    boxes = torch.rand(*shape, 4, dtype=torch.float64)
    boxes[..., 2:] = boxes[..., :2] + 0.05 + boxes[..., 2:]
    return boxes.to(dtype)


def scalar_value(a: list[float], b: list[float], kind: str) -> float:
    """The definitions again, pair by pair in Python floats, for boxes of positive size."""
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    cw, ch = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    iou = inter / union
    if kind == "iou":
        return iou
    if kind == "giou":
        return iou - (cw * ch - union) / (cw * ch)
    shift = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    diou = iou - shift / (cw**2 + ch**2 + 1e-7)
    if kind == "diou":
        return diou
    angles = [math.atan((x[2] - x[0]) / (x[3] - x[1])) for x in (a, b)]
    v = 4 / math.pi**2 * (angles[1] - angles[0]) ** 2
    return diou - v * v / (1 - iou + v + 1e-7)


def check_values(kind: str) -> None:
    torch.testing.assert_close(
        pairwise_iou(torch.tensor(A), torch.tensor(B), kind=kind), torch.tensor(VALUES[kind]), rtol=2e-6, atol=2e-7
    )
    a, b = random_boxes(2, 5), random_boxes(2, 35)
    want = [
        [[scalar_value(x, y, kind) for y in b[i].tolist()] for x in a[i].tolist()] for i in range(2)
    ]  # 35: past a block
    torch.testing.assert_close(pairwise_iou(a, b, kind=kind), torch.tensor(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_torchvision(kind: str) -> None:
    check_values(kind)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_values_of_torchvision(kind: str) -> None:
    check_values(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", [None, "max"])
def test_gradients_by_finite_differences(kind: str, reduce: str | None) -> None:
    a, b = (random_boxes(2, n, dtype=torch.float64).requires_grad_() for n in (4, 3))
    n_a, n_b = torch.tensor([4, 2]), torch.tensor([3, 1])
    assert torch.autograd.gradcheck(lambda x, y: pairwise_iou(x, y, kind=kind, reduce=reduce, n_a=n_a, n_b=n_b), (a, b))


def check_edges() -> None:
    box, inverted, flat, point = [0.0, 0, 4, 4], [4.0, 4, 0, 0], [1.0, 1, 1, 3], [2.0, 2, 2, 2]
    nan, infinite, huge = [0, math.nan, 4, 4], [0, 0, math.inf, 4], [-1e30, -1e30, 1e30, 1e30]
    a = torch.tensor([inverted, flat, point, nan, infinite, huge, box]).requires_grad_()
    b = torch.tensor([box, point, [0.0, 0, 0, 0]]).requires_grad_()
    for kind in KINDS:
        value = pairwise_iou(a, b, kind=kind)
        assert value.isfinite().all()
        assert (value[3:6] == 0).all()  # not finite, or overflowing: 0 in every kind
        ones = torch.ones(()).expand(value.shape)  # stride 0, as .sum() sends it
        grads = torch.autograd.grad(value, (a, b), ones)
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][3:6] == 0).all()
    assert (pairwise_iou(a, b)[:3] == 0).all()
    giou = pairwise_iou(a, b, kind="giou")
    assert giou[1, 0] == 0  # torchvision: no area of its own, hull = the other box
    assert giou[2, 1] == 0  # two equal points: no hull
    assert giou[2, 2] == -1  # two points apart: an empty union in a hull
    assert pairwise_iou(a, b, reduce="max").isfinite().all()


def test_edges_are_defined() -> None:
    check_edges()


@pytest.mark.interpreter
def test_kernel_edges_are_defined() -> None:
    check_edges()


def check_counts_and_maximum(kind: str) -> None:
    a, b = random_boxes(3, 5), random_boxes(3, 34)
    b[:, 33] = b[:, 2] = a[:, 1]  # the maximum is reached twice: its gradient goes to the first
    n_a, n_b = torch.tensor([5, 2, 9]), torch.tensor([34, 3, -1])
    table = pairwise_iou(a, b, kind=kind, n_a=n_a, n_b=n_b)
    full = pairwise_iou_reference(a, b, kind=kind)
    inside = (torch.arange(5) < n_a[:, None])[:, :, None] & (torch.arange(34) < n_b[:, None])[:, None]
    torch.testing.assert_close(table, torch.where(inside, full, 0.0), rtol=1e-5, atol=1e-6)
    a.requires_grad_(), b.requires_grad_()
    top = pairwise_iou(a, b, kind=kind, n_a=n_a, n_b=n_b, reduce="max")
    want = torch.where(inside, full, -torch.inf).amax(2)
    torch.testing.assert_close(top, torch.where(want > -torch.inf, want, 0.0), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(top.sum(), b)
    assert (grad[0, 33] == 0).all()
    assert (grad[1, 3:] == 0).all()
    assert (grad[2] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_fused_maximum(kind: str) -> None:
    check_counts_and_maximum(kind)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", [None, "max"])
def test_kernel_gradients_equal_the_eager_ones(kind: str, reduce: str | None) -> None:
    if reduce:
        check_counts_and_maximum(kind)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = random_boxes(2, 1, 3).to(dtype), random_boxes(1, 1, 33).to(dtype)
        b[0, :, 4] = a[0, :, 0]  # equal boxes: ties in every minimum and maximum
        kernel, eager = ([x.to(t).requires_grad_() for x in (a, b)] for t in (dtype, torch.float64))
        out = pairwise_iou(*kernel, kind=kind, reduce=reduce)
        want = pairwise_iou_reference(*eager, kind=kind, reduce=reduce)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
        upstream = torch.randn(out.shape)
        got = torch.autograd.grad(out, kernel, upstream)
        expected = torch.autograd.grad(want, eager, upstream.double())
        bound = 1e-5 if dtype == torch.float32 else 8e-3
        for g, e in zip(got, expected, strict=True):
            assert g.dtype == dtype
            assert (g.double() - e).abs().max() <= bound * (1 + e.abs().max())


@given(data=st.data())
def test_any_coordinates(data: st.DataObject) -> None:
    number = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, 2.0, -1.0, 1e-45, 1e-22, 3e38]))
    box = st.lists(number, min_size=4, max_size=4)
    a, b = (torch.tensor(data.draw(st.lists(box, min_size=1, max_size=3))).requires_grad_() for _ in range(2))
    for kind in KINDS:
        value = pairwise_iou(a, b, kind=kind)
        assert value.isfinite().all()
        assert (value <= 1 + 1e-6).all()
        torch.testing.assert_close(pairwise_iou(b, a, kind=kind), value.mT)
        if kind == "iou":
            assert (value >= 0).all()


def test_ciou_of_a_flat_box_is_exact_in_float64() -> None:
    a, b = (torch.tensor([box], dtype=torch.float64) for box in ([0.0, 0, 2, 0], [0.0, 0, 1, 1]))
    v = (4 / math.pi**2) * (math.pi / 2 - math.pi / 4) ** 2
    distance = (0.5**2 + 0.5**2) / (2.0**2 + 1.0**2 + 1e-7)
    assert abs(float(pairwise_iou(a, b, kind="ciou")) - (-distance - v * v / (1 + v + 1e-7))) < 1e-15


def test_shapes_dtypes_and_broadcast() -> None:
    a, b = random_boxes(4, 1, 3), random_boxes(2, 5)
    assert pairwise_iou(a, b).shape == (4, 2, 3, 5)
    assert pairwise_iou(a, b, reduce="max", n_b=torch.full((4, 2), 3)).shape == (4, 2, 3)
    assert pairwise_iou(a[:, :, :0], b).shape == (4, 2, 0, 5)
    assert pairwise_iou(a, b[:, :0]).shape == (4, 2, 3, 0)
    assert pairwise_iou(a, b[:, :0], reduce="max").tolist() == torch.zeros(4, 2, 3).tolist()
    assert pairwise_iou(a.double(), b.double()).dtype == torch.float64
    assert pairwise_iou(a.half(), b.half()).dtype == torch.float32
    strided = random_boxes(3, 8).mT.contiguous().mT[:, ::2]
    torch.testing.assert_close(pairwise_iou(strided, strided), pairwise_iou(strided.clone(), strided.clone()))


def test_wrong_arguments_are_named() -> None:
    a = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"b: expected shape \[..., any, 4\], got \[2, 3\]"):
        pairwise_iou(a, torch.zeros(2, 3))
    with pytest.raises(TypeError, match="b: expected dtype float32, got float64"):
        pairwise_iou(a, a.double())
    with pytest.raises(ValueError, match="kind: expected one of iou, giou, diou, ciou, got 'siou'"):
        pairwise_iou(a, a, kind="siou")
    with pytest.raises(ValueError, match="reduce: expected None or 'max', got 'mean'"):
        pairwise_iou(a, a, reduce="mean")
    with pytest.raises(ValueError, match=r"leading dimensions \[2\] and \[3\] differ"):
        pairwise_iou(a, torch.zeros(3, 3, 4))
    with pytest.raises(ValueError, match=r"n_a: expected shape \[2\], got \[3\]"):
        pairwise_iou(a, a, n_a=torch.ones(3, dtype=torch.int64))


def test_compiles_without_a_break() -> None:
    a, b = random_boxes(2, 3).requires_grad_(), random_boxes(2, 4)
    compiled = torch.compile(lambda x, y: pairwise_iou(x, y, kind="ciou"), fullgraph=True, backend="aot_eager")
    out = compiled(a, b)
    torch.testing.assert_close(out, pairwise_iou(a, b, kind="ciou"))
    (grad,) = torch.autograd.grad(out.sum(), a)
    (want,) = torch.autograd.grad(pairwise_iou(a, b, kind="ciou").sum(), a)
    torch.testing.assert_close(grad, want)


@pytest.mark.interpreter
@pytest.mark.parametrize("reduce", [False, True])
def test_kernel_operator_registration_and_compile(reduce: bool) -> None:
    a, b = random_boxes(2, 3).requires_grad_(), random_boxes(2, 4).requires_grad_()
    counts = torch.tensor([3, 1]), torch.tensor([4, 0])
    torch.library.opcheck(torch.ops.fastrl.pairwise_iou.default, (a, b, *counts, 1, reduce))
    compiled = torch.compile(lambda x, y: pairwise_iou(x, y, kind="giou"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), pairwise_iou(a, b, kind="giou"))
    assert pairwise_iou(a[:, :0], b).shape == (2, 0, 4)
    assert pairwise_iou(a, b[:, :0], reduce="max").sum() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_equals_eager(kind: str) -> None:
    a, b = random_boxes(8, 301).cuda().requires_grad_(), random_boxes(8, 77).cuda().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    for reduce in (None, "max"):
        out = pairwise_iou(a, b, kind=kind, reduce=reduce)
        want = pairwise_iou_reference(*exact, kind=kind, reduce=reduce)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
        upstream = torch.randn_like(out)
        for g, e in zip(
            torch.autograd.grad(out, (a, b), upstream),
            torch.autograd.grad(want, exact, upstream.double()),
            strict=True,
        ):
            assert (g.double() - e).abs().max() <= 1e-4 * (1 + e.abs().max())
