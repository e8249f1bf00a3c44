"""Both attention paths against one dense softmax over the whole row under the visibility rule."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastrl.models.attention.prefix import (
    _equal_lengths,
    answer_attention,
    language_attention,
    packed_row,
    segment_attention,
)
from fastrl.segments import AnswerRows, Segments, Span
from fastrl_kernels import varlen
from fastrl_kernels.prefix_attention import dense_attention, gathered_attention
from tests.helpers.attention import copy_nothing, eager_varlen, truth

SHAPES: dict[str, list[tuple[int, tuple[int, ...]]]] = {
    "equal": [(7, (4, 4, 4))],
    "ragged": [(5, (1, 9, 3, 2, 8))],
    "several groups": [(3, (2, 5)), (1, (1,)), (6, ())],
    "empty completions": [(4, (0, 0)), (3, (0, 2, 0, 9))],
    "one row": [(1, ())],
    "prompts longer than their answers": [(40, (3, 2, 3)), (9, (0, 1, 0)), (50, (12, 1, 4, 2))],
}


def segments_of(shape: list[tuple[int, tuple[int, ...]]]) -> Segments:
    spans, at = [], 0
    for prompt, completions in shape:
        spans.append(Span(at, prompt, completions))
        at += spans[-1].length
    return Segments(tuple(spans))


def visible(segments: Segments) -> Tensor:
    """[L, L] bool: may row i attend to row j? The rule of the layout, independent of the library's code."""
    group, part = [], []
    for n, span in enumerate(segments.spans):
        group += [n] * span.length
        part += [0] * span.prompt + [i for i, length in enumerate(span.completions, 1) for _ in range(length)]
    rows = range(segments.length)
    return torch.tensor([[j <= i and group[i] == group[j] and part[j] in (0, part[i]) for j in rows] for i in rows])


def run_both(segments: Segments, heads: int, kv_heads: int, path: str) -> None:
    length, d, scale = segments.length, 8, 0.3
    inputs = [torch.randn(1, h, length, d, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(1, length, heads, d, dtype=torch.float64)
    results = []
    for run in (path, "truth"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        if run == "dense":
            out = dense_attention(*packed_row(*leaves, segments.length), segments.dense, scale=scale)[None]
        elif run == "varlen":
            row = packed_row(*leaves, segments.length)
            out = gathered_attention(*row, segments.varlen, eager_varlen, scale=scale)[None]
        else:
            out = truth(*leaves, visible(segments), scale)
        results.append([out.detach(), *torch.autograd.grad((out * upstream).sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def dense_or(path: str, patch: pytest.MonkeyPatch) -> str:
    """ "merged" is "dense" whose answers copy no prompt's keys."""
    if path != "merged":
        return path
    copy_nothing(patch)
    return "dense"


class Held:
    """Prompts' keys and values, cut out of those of the whole row."""

    def __init__(self, segments: Segments, key: Tensor, value: Tensor) -> None:
        self.rows: AnswerRows = segments.answers
        self.pairs = [
            (key[:, :, span.start : span.start + span.prompt], value[:, :, span.start : span.start + span.prompt])
            for span in segments.spans
        ]

    def prompts(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        assert layer == 3
        return self.pairs


def run_answers(segments: Segments, heads: int, kv_heads: int, path: str) -> None:
    """Answers alone, in both paths, against the rows of the whole."""
    rows, d, scale = segments.answers.rows, 8, 0.3
    if not len(rows):
        return
    inputs = [torch.randn(1, h, segments.length, d, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(1, len(rows), heads, d, dtype=torch.float64)
    results = []
    for run in (path, "truth"):
        q, k, v = leaves = [x.clone().requires_grad_() for x in inputs]
        if run == "truth":
            out = truth(*leaves, visible(segments), scale)[:, rows]
        else:
            call = eager_varlen if run == "varlen" else None
            own = (x[:, :, rows] for x in leaves)
            out = answer_attention(*own, Held(segments, k, v), 3, call, scale=scale)
        results.append([out.detach(), *torch.autograd.grad((out * upstream).sum(), [q, k, v])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", ["dense", "merged", "varlen"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_answers_alone_are_rows_of_the_whole(
    shape: list, heads: tuple[int, int], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_answers(segments_of(shape), *heads, dense_or(path, monkeypatch))


@pytest.mark.parametrize("path", ["dense", "merged", "varlen"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_gradients_follow_the_visibility_rule(
    shape: list, heads: tuple[int, int], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_both(segments_of(shape), *heads, dense_or(path, monkeypatch))


spans = st.tuples(st.sampled_from([1, 2, 3, 5, 30]), st.lists(st.integers(0, 6), max_size=4).map(tuple))


@given(st.lists(spans, min_size=1, max_size=4), st.sampled_from(["dense", "merged", "varlen"]))
def test_any_row_follows_the_visibility_rule(shape: list, path: str) -> None:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        path = dense_or(path, patch)
        run_both(segments_of(shape), 2, 1, path)
        run_answers(segments_of(shape), 2, 1, path)


def test_answers_name_their_rows_and_what_predicts_each_token() -> None:
    segments = segments_of([(3, (2, 0, 1)), (2, (3,))])
    assert segments.answers.rows.tolist() == [3, 8, 9]
    assert segments.answers.predict.tolist() == [0, 2, 0, 1, 3, 4]  # states of two prompts, then three rows
    nothing = segments_of([(4, (1, 0))]).answers
    assert (nothing.length, nothing.rows.tolist(), nothing.predict.tolist()) == (0, [], [0])


def test_tables_take_work_in_proportion_to_the_segments() -> None:
    """Counted: calls of Python and C functions for 40 and for 80 groups, and for windows of as many lengths."""

    def made(groups: int) -> None:
        segments = segments_of([(3, (2, 5, 1))] * groups)
        assert segments.varlen.rows == segments.dense.groups[-1].span.start + 11 == segments.length
        assert len(segments.scans.completions) == 2
        assert segments.answers.varlen.rows == segments.answers.length == 5 * groups
        assert len(segments.answers.dense[0]) == groups
        assert len(_equal_lengths.__wrapped__(tuple(range(1, groups + 1)))[0]) == groups

    def calls(groups: int) -> int:
        count = 0

        def traced(frame: object, event: str, arg: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(traced)
        try:
            made(groups)
        finally:
            sys.setprofile(None)
        return count

    made(1)
    assert calls(80) <= 2.05 * calls(40)


def test_padding_at_most_doubles_the_completion_rows() -> None:
    (group,) = segments_of([(3, (1, 1, 2, 3, 5, 8, 13, 21, 300))]).dense.groups
    assert [b.rows.shape[1] for b in group.blocks] == [300, 21, 8, 3, 1]
    assert sum(b.rows.numel() for b in group.blocks) <= 2 * (1 + 1 + 2 + 3 + 5 + 8 + 13 + 21 + 300)


def test_keys_of_the_gather_follow_their_segments() -> None:
    tables = segments_of([(3, (2, 0, 1)), (2, ())]).varlen
    assert tables.keys.index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert (tables.cu_q.tolist(), tables.cu_k.tolist()) == ([0, 3, 5, 6, 8], [0, 3, 8, 12, 14])
    answers = segments_of([(3, (3, 1)), (2, (2,))]).answers.varlen
    assert answers.keys.index.tolist() == [0, 1, 2, 5, 6, 3, 4, 7]
    assert answers.keys.begins.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (4, 2, 4, 1, 2), (3, 0, 3)])
def test_segments_of_a_vision_row_see_only_themselves(lengths: tuple[int, ...]) -> None:
    length = sum(lengths)
    q, k, v = (torch.randn(1, 3, length, 8, dtype=torch.float64) for _ in range(3))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    want = truth(q, k, v, owner[:, None] == owner[None], 0.25)
    torch.testing.assert_close(segment_attention(q, k, v, lengths, scale=0.25), want, rtol=1e-10, atol=1e-10)


def test_rows_that_do_not_match_their_segments_are_errors() -> None:
    segments = segments_of([(3, (2,))])
    x = torch.zeros(1, 2, 6, 8)
    with pytest.raises(ValueError, match=r"query: expected one row of 5 tokens, got \[1, 2, 6, 8\]"):
        language_attention(None, x, x, x, None, fastrl_segments=segments)
    with pytest.raises(ValueError, match="does not follow row 0"):
        Segments((Span(1, 3, ()),))
    with pytest.raises(ValueError, match="prompt of at least one token"):
        Segments((Span(0, 0, (2,)),))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_variable_length_kernel_agrees_on_the_gpu(shape: list, heads: tuple[int, int]) -> None:
    call, reason = varlen.choose(torch.device("cuda"), torch.bfloat16, 64)
    if call is None:
        pytest.skip(reason)
    segments = segments_of(shape)
    inputs = [
        torch.randn(1, h, segments.length, 64, device="cuda", dtype=torch.bfloat16)
        for h in (heads[0], heads[1], heads[1])
    ]
    leaves = [x.clone().requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    row = packed_row(*leaves, segments.length)
    got = gathered_attention(*row, segments.to("cuda").varlen, call, scale=0.125)[None]
    want = truth(*wide, visible(segments).cuda(), 0.125)
    upstream = torch.randn_like(want)
    grads = torch.autograd.grad((got.double() * upstream).sum(), leaves)
    want_grads = torch.autograd.grad((want * upstream).sum(), wide)
    for a, b in zip([got, *grads], [want, *want_grads], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.05)
