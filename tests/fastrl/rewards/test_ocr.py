"""OCR reward: edit distance against the textbook recurrence, white space, and the bound for huge texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.data.records import Record
from fastrl.rewards import reward_for
from fastrl.rewards.ocr import edit_distance, text_similarity


def record(text: str) -> Record:
    return Record("a", "ocr", (), (), {"text": text})


def textbook(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


short_text = st.text("ab é字", max_size=12)


@given(short_text, short_text)
def test_edit_distance_equals_the_recurrence(a: str, b: str) -> None:
    assert edit_distance(a, b) == textbook(a, b)


@given(short_text, short_text, st.integers(1, 60))
def test_bounded_distance_is_a_valid_edit_script(a: str, b: str, max_cells: int) -> None:
    bounded = edit_distance(a, b, max_cells)
    assert textbook(a, b) <= bounded <= max(len(a), len(b))
    if len(a) * len(b) <= max_cells:
        assert bounded == textbook(a, b)


def test_similarity_against_hand_computed_values() -> None:
    answers = ["kitten", "sitting", "", "  kitten\n", "<|im_start|>kitten<|im_end|>", "```\nkitten\n```"]
    got = reward_for("ocr")(answers, record("kitten"))
    assert got == {"text": pytest.approx([1.0, 1 - 3 / 7, 0.0, 1.0, 1.0, 1.0])}


@pytest.mark.parametrize("page", ["```python\nprint(1)\n```", "a <answer> b", "x <|name|> y", "one </think> two"])
def test_a_page_that_holds_markup_itself_can_be_read_exactly(page: str) -> None:
    assert text_similarity(page, page) == 1.0
    assert text_similarity(f" {page}\n", page) == 1.0


def test_white_space_is_collapsed_on_both_sides() -> None:
    assert text_similarity("a\n\n b\tc ", "a b  c") == 1.0
    assert text_similarity("ab c", "a b c") == pytest.approx(0.8)


def test_empty_truth_and_empty_answer_agree() -> None:
    assert text_similarity(" \n", "") == 1.0
    assert text_similarity("x", "") == 0.0


@given(short_text, short_text)
def test_similarity_is_symmetric_and_one_only_for_equal_texts(a: str, b: str) -> None:
    assert text_similarity(a, b) == text_similarity(b, a)
    assert (text_similarity(a, b) == 1.0) == (a.split() == b.split())


def test_readable_is_any_visible_text() -> None:
    answers = ["x", "", " \n", "<|im_end|>"]
    assert reward_for("ocr").readable(answers, [record("x")] * 4) == [True, False, False, False]
