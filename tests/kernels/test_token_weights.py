"""Token weights against explicit counts, for ragged, unsorted, masked and empty batches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrl_kernels.token_weights import token_weights


def _oracle(ids: list[int], mask: list[bool], aggregate: str, normalizer: float | None) -> list[float]:
    rows = [(i, m and i >= 0) for i, m in zip(ids, mask, strict=True)]
    tokens = Counter(i for i, keep in rows if keep)
    last = {"sequence": len(tokens), "token": sum(tokens.values()), "constant": None}[aggregate]
    last = last if normalizer is None else normalizer
    own = (lambda i: tokens[i]) if aggregate == "sequence" else (lambda i: 1)
    return [1 / (own(i) * last) if keep else 0.0 for i, keep in rows]


@given(
    st.lists(st.tuples(st.integers(-1, 6), st.booleans()), max_size=40),
    st.sampled_from(["sequence", "token", "constant"]),
    st.sampled_from([None, 1, 7, 0.5]),
    st.booleans(),
)
def test_weights_are_the_written_out_means(rows, aggregate, normalizer, bounded):
    if aggregate == "constant" and normalizer is None:
        normalizer = 3.0
    ids, mask = [i for i, _ in rows], [m for _, m in rows]
    got = token_weights(
        torch.tensor(ids, dtype=torch.int64),
        aggregate=aggregate,
        mask=torch.tensor(mask, dtype=torch.bool),
        normalizer=normalizer,
        n_completions=7 if bounded else None,
        dtype=torch.float64,
    )
    assert got.tolist() == pytest.approx(_oracle(ids, mask, aggregate, normalizer), rel=1e-12)


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_weights_of_a_step_do_not_depend_on_its_split(aggregate):
    ids = torch.tensor([4, 4, 4, 9, 9, 2, 1 << 40])
    mask = torch.tensor([1, 0, 1, 1, 1, 1, 0])
    whole = token_weights(ids, aggregate=aggregate, mask=mask)
    count = 3 if aggregate == "sequence" else 5  # of the step: completions with a token, tokens
    for normalizer in (count, torch.tensor(count), torch.tensor(float(count))):
        parts = [
            token_weights(ids[a:b], aggregate=aggregate, mask=mask[a:b], normalizer=normalizer)
            for a, b in ((0, 3), (3, 5), (5, 7))
        ]
        torch.testing.assert_close(torch.cat(parts), whole)
    assert whole.sum().item() == pytest.approx(1)


def test_fully_masked_completions_do_not_count_unless_the_normalizer_says_so():
    ids, mask = torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, False, False])
    assert token_weights(ids, mask=mask).tolist() == [0.5, 0.5, 0, 0]
    assert token_weights(ids, mask=mask, normalizer=2).tolist() == [0.25, 0.25, 0, 0]


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_nothing_unmasked_gives_zeros(aggregate):
    for ids in (torch.empty(0, dtype=torch.int64), torch.full((3,), -1)):
        assert token_weights(ids, aggregate=aggregate).tolist() == [0.0] * len(ids)
    ids = torch.tensor([0, 1], dtype=torch.int32)
    assert token_weights(ids, aggregate=aggregate, mask=torch.zeros(2, dtype=torch.bool)).tolist() == [0, 0]
    assert token_weights(ids, aggregate=aggregate, normalizer=torch.tensor(0)).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_counts_beyond_a_narrow_dtype(aggregate, dtype):
    """70,000 tokens do not fit float16, their weights do."""
    weights = token_weights(torch.zeros(70_000, dtype=torch.int64), aggregate=aggregate, dtype=dtype)
    assert weights.dtype == dtype
    assert torch.equal(weights, torch.full((70_000,), 1 / 70_000, dtype=dtype))


def test_compiles_into_one_graph():
    compiled = torch.compile(token_weights, fullgraph=True, backend="aot_eager")
    ids, mask = torch.tensor([3, 0, 3, -1, 5]), torch.tensor([True, True, True, True, False])
    torch.testing.assert_close(compiled(ids, mask=mask), token_weights(ids, mask=mask))
    torch.testing.assert_close(compiled(ids, n_completions=6), token_weights(ids, n_completions=6))


@pytest.mark.parametrize(
    ("error", "match", "ids", "options"),
    [
        (ValueError, "aggregate: expected one of .* got 'mean'", [0], {"aggregate": "mean"}),
        (ValueError, "normalizer: aggregate='constant' needs one", [0], {"aggregate": "constant"}),
        (ValueError, "normalizer: expected a positive number, got 0", [0], {"normalizer": 0}),
        (ValueError, r"normalizer: expected shape \[\]", [0], {"normalizer": torch.ones(1)}),
        (ValueError, r"completion: expected shape \[any\], got \[1, 1, 1\]", [[[0]]], {}),
        (TypeError, "completion: expected dtype int64, int32, got float32", [0.0], {}),
        (ValueError, r"mask: expected shape \[1\]", [0], {"mask": torch.ones(2, dtype=torch.bool)}),
        (TypeError, "mask: expected dtype bool", [0], {"mask": torch.ones(1)}),
        (ValueError, "completion: id 4 is out of range, there are 3", [4], {"n_completions": 3}),
    ],
)
def test_bad_arguments_are_named(error, match, ids, options):
    with pytest.raises(error, match=match):
        token_weights(torch.tensor(ids), **options)
