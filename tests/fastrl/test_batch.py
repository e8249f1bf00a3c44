"""Packing: layout, prediction rows, budgets, images by index, values per token and per completion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastrl.batch import Completion, ImageInput, Prompt, PromptGroup, pack, pack_row
from fastrl.models.positions import mrope_positions


def image(key: str) -> ImageInput:
    return ImageInput(torch.zeros(16, 8), (1, 4, 4), key)


def group(prompt: int, lengths: list[int], keys: list[str] | None = None, first_id: int = 0) -> PromptGroup:
    """``prompt`` text tokens, with 4 image tokens after the first for each key; ids count up from ``first_id``."""
    slots = tuple((1 + 4 * n, 4) for n in range(len(keys or [])))
    length = prompt + 4 * len(slots)
    ids = torch.arange(first_id, first_id + length + sum(lengths))
    images = tuple(image(key) for key in keys or [])
    encoded = Prompt(ids[:length], mrope_positions(length, slots, [(1, 4, 4)] * len(slots), 2), images, slots)
    pieces = ids[length:].split(lengths)
    return PromptGroup(encoded, [Completion(piece) for piece in pieces])


def test_layout_prediction_rows_and_positions() -> None:
    batch = pack_row([group(3, [2, 3]), group(2, [1], ["a"], first_id=100)])
    assert batch.input_ids.tolist() == [[*range(8), *range(100, 107)]]
    # The prompt's last row predicts the first token of both completions; the others follow their predecessor.
    assert batch.predict_rows.tolist() == [2, 3, 2, 5, 6, 13]
    assert batch.targets.tolist() == [3, 4, 5, 6, 7, 106]
    assert batch.completion_of_token.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.group_of_completion.tolist() == [0, 0, 1]
    assert batch.positions.shape == (3, 1, 15)
    assert batch.positions[0, 0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1, 1, 1, 3, 4]
    assert batch.positions[2, 0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 1, 2, 3, 4]
    assert batch.image_rows.tolist() == [9, 10, 11, 12]
    assert batch.n_groups == 2


def test_an_image_two_groups_share_is_held_once_and_referred_to_by_index() -> None:
    batch = pack_row([group(2, [1], ["a", "b"]), group(2, [1]), group(2, [1], ["b", "b", "c"])])
    assert [i.key for i in batch.images] == ["a", "b", "c"]
    assert batch.image_of_slot == (0, 1, 1, 1, 2)
    assert len(batch.image_rows) == 20


def test_budget_keeps_order_never_splits_a_group_and_lets_a_large_one_stand_alone() -> None:
    groups = [group(3, [2]), group(3, [2]), group(20, [5]), group(2, [1]), group(3, [])]
    sizes = [[s.length for s in b.segments.spans] for b in pack(groups, 10)]
    assert sizes == [[5, 5], [25], [3]]
    assert [len(b.segments.spans) for b in pack(groups, 1)] == [1, 1, 1, 1]
    assert [len(b.segments.spans) for b in pack(groups, 1000)] == [4], "a group without completions is left out"
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="token_budget: expected at least 1, got 0"):
        pack(groups, 0)


def with_values(one: PromptGroup) -> PromptGroup:
    for n, completion in enumerate(one.completions):
        length = len(completion.token_ids)
        completion.per_token["old_logp"] = torch.arange(length) + 10.0 * n
        completion.sampler_logp = -torch.ones(length)
        completion.scalars["advantage"] = n - 0.5
    return one


def test_values_of_tokens_and_completions_follow_them_and_split_back() -> None:
    batch = pack_row([with_values(group(2, [2, 0, 1])), with_values(group(1, [1]))])
    assert batch.per_token["old_logp"].tolist() == [0, 1, 20, 0]
    assert batch.per_token["sampler_logp"].tolist() == [-1] * 4
    assert batch.per_completion["advantage"].tolist() == [-0.5, 0.5, 1.5, -0.5]
    assert batch.per_completion["advantage"].dtype == torch.float32
    assert [x.tolist() for x in batch.split(batch.targets)] == [[2, 3], [], [4], [1]]
    assert batch.to("cpu") is batch


def test_values_that_only_some_have_or_of_the_wrong_length_are_errors() -> None:
    one = with_values(group(2, [2, 1]))
    del one.completions[1].per_token["old_logp"]
    with pytest.raises(ValueError, match="completion 1 of the batch has no per-token value 'old_logp'"):
        pack_row([one])
    one.completions[1].per_token["old_logp"] = torch.zeros(3)
    with pytest.raises(ValueError, match="completion 1: per-token 'old_logp' has 3 values for 1 tokens"):
        pack_row([one])
    one = with_values(group(2, [2, 1]))
    del one.completions[0].scalars["advantage"]
    with pytest.raises(ValueError, match="completion 0 of the batch has no scalar value 'advantage'"):
        pack_row([one])
    with pytest.raises(ValueError, match="group 0 of the batch has an empty prompt"):
        pack_row(
            [PromptGroup(Prompt(torch.empty(0, dtype=torch.int64), torch.zeros(3, 0)), [Completion(torch.ones(1))])]
        )


lengths = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.integers(1, 6), lengths), min_size=1, max_size=6), st.integers(1, 40))
def test_every_token_is_predicted_once_whatever_the_split(shapes: list[tuple[int, list[int]]], budget: int) -> None:
    groups = [group(p, c, first_id=1000 * n) for n, (p, c) in enumerate(shapes)]
    batches = pack(groups, budget)
    assert torch.cat([b.targets for b in batches]).tolist() == [
        int(t) for g in groups for c in g.completions for t in c.token_ids
    ]
    for batch in batches:
        row: Tensor = batch.input_ids[0]
        for at, target, completion in zip(batch.predict_rows, batch.targets, batch.completion_of_token, strict=True):
            ids = batch.completions[int(completion)].token_ids
            place = int((ids == target).nonzero())
            owner = groups[int(target) // 1000].prompt.token_ids
            assert row[at] == (ids[place - 1] if place else owner[-1])
        assert len(batches) == 1 or batch.n_groups == 1 or batch.segments.length <= budget
