"""``lora_update``: the eager twin against float64, the kernel in the interpreter, its arguments, GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import lora_update

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [  # rows, K, r, O of each output
    (1, 1, 1, (1,)),
    (5, 130, 3, (7, 200)),
    (17, 64, 16, (129, 16, 16)),
    (40, 300, 20, (128,)),
    (0, 8, 2, (4, 4)),
    (3, 0, 2, (4,)),
    (2, 8, 2, (0, 5)),
]


def problem(rows: int, k: int, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Any:
    torch.manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)

    low = normal(len(sizes) * rank, k, scale=max(k, 1) ** -0.5)
    return normal(rows, k), low, [normal(o, rank) for o in sizes], [normal(rows, o) for o in sizes], 0.75


def check_update(shape: tuple[Any, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    x, low, highs, outputs, scale = problem(*shape, dtype, device)
    parts = (x.double() @ low.double().t()).split(shape[2], 1)
    rounded = [part.to(dtype).double() for part in parts]  # once, as documented
    truth = [out.double() + scale * part @ b.double().t() for out, part, b in zip(outputs, rounded, highs, strict=True)]
    given = [t.clone() for t in (x, low, *highs)]
    assert lora_update(x, low, highs, outputs, scale) is None
    assert all(torch.equal(a, b) for a, b in zip((x, low, *highs), given, strict=True))
    eps = torch.finfo(dtype).eps
    for out, want in zip(outputs, truth, strict=True):
        assert out.dtype == dtype
        # half a unit of the output, and a part that rounded to its other neighbour
        allowed = eps * (4 if dtype in (torch.float32, torch.float64) else 1) * max(1, shape[2]) ** 0.5
        torch.testing.assert_close(out.double(), want, rtol=3 * allowed, atol=3 * allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_float64(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    check_update(shape, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_equals_float64(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    check_update(shape, dtype)


@pytest.mark.interpreter
def test_a_rows_update_is_the_same_in_any_batch() -> None:
    x, low, highs, outputs, scale = problem(40, 70, 5, (130, 9), torch.float32)
    alone = [out[33:34].clone() for out in outputs]
    lora_update(x[33:34], low, highs, alone, scale)
    lora_update(x, low, highs, outputs, scale)
    assert all(torch.equal(out[33:34], one) for out, one in zip(outputs, alone, strict=True))


@pytest.mark.interpreter
def test_the_kernel_takes_views_as_inputs() -> None:
    x, low, highs, outputs, scale = problem(6, 32, 4, (10, 12), torch.float32)
    want = [out.clone() for out in outputs]
    lora_update(x, low, highs, want, scale)
    turned = [t.t().contiguous().t() for t in (x, low, *highs)]
    lora_update(turned[0], turned[1], turned[2:], outputs, scale)
    assert all(torch.equal(a, b) for a, b in zip(outputs, want, strict=True))


@pytest.mark.interpreter
def test_the_op_passes_opcheck() -> None:
    for sizes in ((6,), (6, 7), (6, 7, 8)):
        given = problem(3, 8, 2, sizes, torch.float32)
        torch.library.opcheck(torch.ops.fastrl.lora_update.default, given)


def test_a_rank_of_zero_or_above_the_kernels_is_eager() -> None:
    check_update((2, 3, 200, (4, 5)), torch.float32)
    out = torch.ones(2, 3)
    lora_update(torch.ones(2, 4), torch.ones(0, 4), [torch.ones(3, 0)], [out], 1.0)
    assert torch.equal(out, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3)}, r"x: expected shape \[any, any\]"),
        ({"low": torch.ones(3, 8)}, r"low: expected shape \[4, 8\], got \[3, 8\]"),
        ({"low": torch.ones(4, 8).half()}, "low: expected dtype float32, got float16"),
        ({"highs": [torch.ones(6, 2)]}, "highs: expected 2 tensors, one for each output, got 1"),
        ({"highs": [torch.ones(6, 2), torch.ones(7, 3)]}, r"highs\[1\]: expected shape \[7, 2\], got \[7, 3\]"),
        ({"outputs": [torch.ones(3, 6), torch.ones(2, 7)]}, r"outputs\[1\]: expected shape \[3, any\]"),
        ({"outputs": [torch.ones(3, 6), torch.ones(7, 3).t()]}, r"outputs\[1\]: changed in place"),
        ({"outputs": []}, "outputs: expected 1 to 3 tensors, got 0"),
        ({"outputs": [torch.ones(3, 6)] * 4}, "outputs: expected 1 to 3 tensors, got 4"),
        ({"outputs": [torch.ones(3, 6), torch.ones(3, 7, device="meta")]}, "tensors on different devices"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    names = ("x", "low", "highs", "outputs", "scale")
    given = dict(zip(names, problem(3, 8, 2, (6, 7), torch.float32), strict=True)) | change
    with pytest.raises((ValueError, TypeError), match=message):
        lora_update(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_equals_float64(dtype: torch.dtype) -> None:
    for shape in (*SHAPES, (64, 2048, 16, (2048, 256, 256)), (256, 11008, 64, (2048,)), (7, 2048, 16, (11008, 11008))):
        check_update(shape, dtype, "cuda")
