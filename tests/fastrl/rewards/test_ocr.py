"""OCR reward: edit distance against the textbook recurrence, white space, and the limit for very long texts."""

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


def test_canonically_equal_texts_are_equal() -> None:
    assert text_similarity("cafe\u0301", "caf\u00e9") == text_similarity("caf\u00e9", "cafe\u0301") == 1.0
    assert text_similarity("\u2460", "1") == 0.0  # compatibility characters are different: no NFKC
    marks = "a" + "\u0327\u0301" * 100_000
    assert text_similarity(marks, "a") < 0.01  # not reordered, which would take hours


def test_normalise_none_compares_the_text_as_it_is() -> None:
    reward = reward_for("ocr", normalise="none")
    answers = ["kitten", "```\nkitten\n```", "<answer>kitten</answer>", "kitten<|im_end|>"]
    got = reward(answers, record("kitten"))["text"]
    assert got == pytest.approx([1.0, 6 / 14, 6 / 23, 6 / 16])
    assert reward(["cafe\u0301"], record("caf\u00e9"))["text"] == pytest.approx([0.6])
    with pytest.raises(ValueError, match="known: nfc, none"):
        reward_for("ocr", normalise="nfkc")


@pytest.mark.parametrize("answer", ["<think>hello world", "<THINK>hello world</think>", "<think>hello world</think> "])
def test_a_thought_about_the_page_is_not_paid(answer: str) -> None:
    assert text_similarity(answer, "hello world") == 0.0
    assert reward_for("ocr").readable([answer], [record("hello world")]) == [False]
    assert text_similarity("<think>one</think> hello world", "hello world") == 1.0
    assert text_similarity("<think>", "") == 0.0
    page = "one </think> two"
    assert text_similarity(f"<think>{page}</think>", page) < 1.0


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
