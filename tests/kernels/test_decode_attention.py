"""``decode_attention``: eager twin against a float64 oracle, the kernels in the interpreter, arguments, GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrl_kernels.decode_attention import decode_attention, decode_attention_reference


def oracle(q, prefix_k, prefix_v, own_k, own_v, counts, prefix_len, own_len, scale=None) -> Tensor:
    """Row by row and head by head in float64. ``counts``: rows of each group; later rows belong to none."""
    group_of = [g for g, count in enumerate(counts) for _ in range(count)]
    gq = q.shape[1] // prefix_k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            k, v = own_k[row, head // gq, : own_len[row]], own_v[row, head // gq, : own_len[row]]
            if row < len(group_of):
                g = group_of[row]
                k = torch.cat([prefix_k[g, head // gq, : prefix_len[g]], k])
                v = torch.cat([prefix_v[g, head // gq, : prefix_len[g]], v])
            if len(k):
                score = k.double() @ q[row, head].double() * (q.shape[2] ** -0.5 if scale is None else scale)
                out[row, head] = torch.softmax(score, 0) @ v.double()
    return out


def problem(counts, heads, gq, d, p, t, *, alone=0, dtype=torch.float32, device="cpu", lengths=True, seed=0):
    """Random tensors for these group sizes; ``alone`` rows of no group at the end; lengths from 0 on."""
    rng = torch.Generator().manual_seed(seed)
    rows, groups = sum(counts) + alone, len(counts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).to(device)

    tensors = (
        normal(rows, heads * gq, d),
        normal(groups, heads, p, d),
        normal(groups, heads, p, d),
        normal(rows, heads, t, d),
        normal(rows, heads, t, d),
    )
    prefix_len = torch.randint(0, p + 1, (groups,), generator=rng, dtype=torch.int32) if lengths else None
    own_len = torch.randint(0, t + 1, (rows,), generator=rng, dtype=torch.int32) if lengths else None
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    tables = {"row_offsets": offsets, "prefix_len": prefix_len, "own_len": own_len}
    return tensors, {name: x if x is None else x.to(device) for name, x in tables.items()}


def expected(tensors, tables, counts) -> Tensor:
    q, prefix_k, _, own_k, _ = tensors
    lengths = [prefix_k.shape[2]] * len(counts) if tables["prefix_len"] is None else tables["prefix_len"].tolist()
    own = [own_k.shape[2]] * len(q) if tables["own_len"] is None else tables["own_len"].tolist()
    return oracle(*(x.cpu() for x in tensors), counts, lengths, own)


CASES = [
    # counts, key heads, query heads per key head, D, P, T, rows of no group
    ((3, 1, 4), 2, 2, 16, 37, 9, 0),
    ((1,), 1, 1, 1, 1, 1, 0),
    ((2, 0, 5), 1, 7, 24, 65, 3, 2),
    ((8, 8), 2, 3, 32, 150, 17, 0),
    ((4,), 1, 8, 80, 20, 0, 1),
    ((2, 3), 3, 1, 8, 0, 5, 0),
    ((11,), 1, 8, 16, 33, 130, 0),
    ((0, 0), 1, 2, 16, 5, 4, 3),
    ((), 2, 1, 16, 5, 4, 3),
]


@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize(("counts", "heads", "gq", "d", "p", "t", "alone"), CASES)
def test_reference_equals_oracle(counts, heads, gq, d, p, t, alone, lengths) -> None:
    tensors, tables = problem(counts, heads, gq, d, p, t, alone=alone, lengths=lengths)
    out = decode_attention_reference(*tensors, **tables)
    torch.testing.assert_close(out.double(), expected(tensors, tables, counts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("counts", "heads", "gq", "d", "p", "t", "alone"), CASES)
def test_reference_in_float64(counts, heads, gq, d, p, t, alone) -> None:
    tensors, tables = problem(counts, heads, gq, d, p, t, alone=alone, dtype=torch.float64)
    out = decode_attention(*tensors, **tables)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected(tensors, tables, counts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype) -> None:
    counts = (4, 2)
    tensors, tables = problem(counts, 2, 3, 32, 200, 20, dtype=dtype)
    out = decode_attention(*tensors, **tables)
    assert out.dtype == dtype
    truth = expected(tensors, tables, counts)
    assert (out.double() - truth).abs().max() <= 2 * torch.finfo(dtype).eps * truth.abs().max()


def test_autocast_rounds_no_product() -> None:
    tensors, tables = problem((3, 3), 2, 2, 16, 10, 4)
    truth = decode_attention(*tensors, **tables)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode_attention(*tensors, **tables), truth)


def test_uneven_groups_compile_whole() -> None:
    tensors, tables = problem((3, 1), 2, 2, 16, 10, 4)
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, **tables, max_rows=3), decode_attention(*tensors, **tables))


def test_equal_groups_need_no_table() -> None:
    tensors, tables = problem((3, 3), 2, 2, 16, 10, 4)
    with_table = decode_attention_reference(*tensors, **tables)
    tables["row_offsets"] = None
    torch.testing.assert_close(decode_attention_reference(*tensors, **tables), with_table)


def test_strided_inputs_and_scale() -> None:
    (q, prefix_k, prefix_v, own_k, own_v), tables = problem((3, 3), 2, 2, 16, 10, 8)
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, prefix_k, prefix_v)]
    lengths = tables["own_len"].clamp(max=5)
    out = decode_attention_reference(
        *strided, own_k[:, :, :5], own_v[:, :, :5], prefix_len=tables["prefix_len"], own_len=lengths, scale=0.7
    )
    truth = oracle(
        q, prefix_k, prefix_v, own_k, own_v, (3, 3), tables["prefix_len"].tolist(), lengths.tolist(), scale=0.7
    )
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)


def test_padding_keys_do_not_matter() -> None:
    tensors, tables = problem((2, 2), 1, 2, 16, 12, 6)
    before = decode_attention_reference(*tensors, **tables)
    for group, length in enumerate(tables["prefix_len"].tolist()):
        tensors[1][group, :, length:] = 1e3
        tensors[2][group, :, length:] = -1e3
    for row, length in enumerate(tables["own_len"].tolist()):
        tensors[3][row, :, length:] = 1e3
        tensors[4][row, :, length:] = 1e3
    assert torch.equal(decode_attention_reference(*tensors, **tables), before)


def test_no_keys_give_zero_and_large_scores_stay_finite() -> None:
    tensors, tables = problem((2,), 1, 1, 16, 6, 4)
    tables["prefix_len"].zero_()
    tables["own_len"].zero_()
    assert not decode_attention_reference(*tensors, **tables).any()
    tensors, tables = problem((2,), 1, 1, 16, 6, 4, lengths=False)
    assert decode_attention_reference(tensors[0] * 1e4, *tensors[1:], **tables).isfinite().all()
    none = tuple(x[:0] for x in tensors)
    assert decode_attention_reference(*none).shape == (0, 1, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, _: x.update(own_k=x["own_k"][:-1]), r"own_k: expected shape \[6, 2, any, 16\], got \[5, 2, 4, 16\]"),
        (lambda x, _: x.update(prefix_v=x["prefix_v"][:, :, :3]), r"prefix_v: expected shape \[2, 2, 5, 16\]"),
        (lambda x, _: x.update(q=x["q"][:, :3]), "q: 3 heads of 16 do not fit 2 key heads"),
        (lambda x, _: x.update(own_v=x["own_v"].half()), "own_v: expected dtype float32, got float16"),
        (lambda _, t: t.update(prefix_len=t["prefix_len"].long()), "prefix_len: expected dtype int32"),
        (lambda _, t: t.update(own_len=t["own_len"][:3]), r"own_len: expected shape \[6\], got \[3\]"),
        (lambda _, t: t.update(max_rows=2), "max_rows: 2, but a group has 4 rows"),
        (lambda x, _: x.update(q=x["q"].to("meta")), "tensors on different devices: q on meta"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    names = ("q", "prefix_k", "prefix_v", "own_k", "own_v")
    tensors, tables = problem((4, 2), 2, 2, 16, 5, 4)
    given = dict(zip(names, tensors, strict=True))
    change(given, tables)
    with pytest.raises((ValueError, TypeError), match=message):
        decode_attention(*(given[name] for name in names), **tables)


def test_rows_that_do_not_split_into_groups() -> None:
    tensors, _ = problem((3, 2), 1, 1, 16, 5, 4)
    with pytest.raises(ValueError, match="5 rows do not split into 2 equal groups"):
        decode_attention(*tensors)


@pytest.mark.interpreter
@pytest.mark.parametrize(("counts", "heads", "gq", "d", "p", "t", "alone"), CASES)
def test_kernel_equals_oracle(counts, heads, gq, d, p, t, alone) -> None:
    tensors, tables = problem(counts, heads, gq, d, p, t, alone=alone)
    out = decode_attention(*tensors, **tables, max_rows=max(counts, default=0))
    torch.testing.assert_close(out.double(), expected(tensors, tables, counts), rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
def test_kernel_without_tables() -> None:
    tensors, _ = problem((2, 2), 1, 3, 24, 40, 7)
    truth = oracle(*tensors, (2, 2), [40, 40], [7] * 4)
    torch.testing.assert_close(decode_attention(*tensors).double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
def test_kernel_merges_many_splits() -> None:
    counts = (2, 1)
    tensors, tables = problem(counts, 1, 2, 16, 700, 300)
    tables["prefix_len"][:] = torch.tensor([700, 300])
    tables["own_len"][:] = torch.tensor([0, 129, 300])
    out = decode_attention(*tensors, **tables)  # max_rows not given: as many as there are rows
    torch.testing.assert_close(out.double(), expected(tensors, tables, counts), rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
def test_kernel_takes_strides_and_never_reads_padding() -> None:
    (q, prefix_k, prefix_v, own_k, own_v), tables = problem((3, 3), 2, 2, 16, 10, 8)
    truth = oracle(q, prefix_k, prefix_v, own_k, own_v, (3, 3), tables["prefix_len"], tables["own_len"])
    for group, length in enumerate(tables["prefix_len"].tolist()):
        prefix_k[group, :, length:] = math.nan
        prefix_v[group, :, length:] = math.nan
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (prefix_k, prefix_v)]
    turned = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    own_v = own_v.transpose(1, 3).contiguous().transpose(1, 3)  # other strides than own_k
    out = decode_attention(turned, *strided, own_k, own_v, prefix_len=tables["prefix_len"], own_len=tables["own_len"])
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
def test_op_passes_opcheck() -> None:
    tensors, tables = problem((2, 1), 1, 2, 16, 5, 4)
    given = (*tensors, tables["row_offsets"], tables["prefix_len"], tables["own_len"], 2, 0.25)
    torch.library.opcheck(torch.ops.fastrl.decode_attention.default, given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("counts", "heads", "gq", "d", "p", "t", "alone"),
    [*CASES, ((8,) * 4, 2, 8, 128, 1200, 70, 0), ((5, 8), 4, 7, 128, 333, 600, 3), ((2,), 2, 2, 256, 100, 9, 0)],
)
def test_gpu_equals_oracle(counts, heads, gq, d, p, t, alone, dtype) -> None:
    tensors, tables = problem(counts, heads, gq, d, p, t, alone=alone, dtype=dtype, device="cuda")
    out = decode_attention(*tensors, **tables, max_rows=max(counts, default=0))
    truth = expected(tensors, tables, counts)
    allowed = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert (out.cpu().double() - truth).abs().max() <= allowed * max(1.0, float(truth.abs().max()))
    assert torch.equal(out, decode_attention(*tensors, **tables, max_rows=max(counts, default=0)))


@pytest.mark.gpu
def test_gpu_never_waits_for_the_device() -> None:
    tensors, tables = problem((8, 8), 2, 8, 128, 300, 20, dtype=torch.bfloat16, device="cuda")
    decode_attention(*tensors, **tables, max_rows=8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_attention(*tensors, **tables, max_rows=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
