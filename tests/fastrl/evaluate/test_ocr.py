"""OCR metrics against manual computation and the papers' formulas; correct answers; unusual and very long texts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.data import load_data
from fastrl.data.records import Record
from fastrl.evaluate import evaluate
from fastrl.evaluate.ocr import bleu, evaluate_ocr, meteor, normalised_edit_distance, word_set_scores, words


def record(text: str) -> Record:
    return Record("a", "ocr", (), (), {"text": text})


def test_a_page_that_holds_markup_itself_can_be_read_exactly() -> None:
    page = "```\nprint(1)\n```"
    assert evaluate_ocr([record(page)], [page])["edit_distance"] == 0.0
    assert evaluate_ocr([record("print(1)")], [page])["edit_distance"] == 0.0  # a code fence that belongs to the answer


def test_pages_are_compared_in_composed_form_or_as_they_are() -> None:
    rows, answers = [record("caf\u00e9")] * 2, ["cafe\u0301", "```\ncaf\u00e9\n```"]
    assert evaluate("ocr", rows, answers)["edit_distance"] == 0.0
    assert evaluate("ocr", rows, answers)["f1"] == 1.0
    raw = evaluate("ocr", rows, answers, normalise="none")
    assert raw["edit_distance"] == pytest.approx((2 / 5 + 8 / 12) / 2)


def test_edit_distance_is_over_the_longer_text() -> None:
    assert normalised_edit_distance("kitten", "sitting") == pytest.approx(3 / 7)
    assert normalised_edit_distance("", "abcd") == 1.0
    assert normalised_edit_distance("", "") == 0.0


def test_word_scores_are_over_sets() -> None:
    f1, precision, recall = word_set_scores(["the", "the", "the", "cat", "sat"], ["the", "cat", "ran", "far"])
    assert (precision, recall) == (pytest.approx(2 / 3), pytest.approx(2 / 4))
    assert f1 == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert word_set_scores([], []) == (1.0, 1.0, 1.0)
    assert word_set_scores([], ["a"]) == word_set_scores(["a"], []) == (0.0, 0.0, 0.0)


def test_bleu_by_hand() -> None:
    truth = ["the", "cat", "sat", "on", "the", "mat"]
    # 1- to 4-gram precisions 5/6, 3/5, 2/4, 1/3; equal lengths, so no brevity penalty
    want = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu(["the", "cat", "sat", "on", "a", "mat"], truth) == pytest.approx(want)
    assert bleu(truth[:5], truth) == pytest.approx(math.exp(1 - 6 / 5))
    assert bleu(truth, truth) == 1.0
    assert bleu(["dog"], truth) == bleu([], truth) == 0.0
    assert bleu(["cat"], ["cat"]) < 1e-50  # no smoothing and no 4-grams: NLTK's default


def test_meteor_by_hand_with_stems_and_fragmentation() -> None:
    truth = ["the", "cats", "sat", "on", "mats"]
    assert meteor(truth, truth) == pytest.approx(1 - 0.5 / 5**3)
    # all five match ("cat" and "mat" by stem), in order, as one chunk
    assert meteor(["the", "cat", "sat", "on", "mat"], truth) == pytest.approx(1 - 0.5 / 5**3)
    # four of five words match, in two chunks: "sat on" and "the cats"
    precision, recall = 4 / 4, 4 / 5
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    assert meteor(["sat", "on", "the", "cats"], truth) == pytest.approx(mean * (1 - 0.5 * (2 / 4) ** 3))
    assert meteor(["feline"], ["cat"]) == meteor([], truth) == 0.0  # synonyms do not count


def test_meteor_stems_words_and_leaves_endless_strings_alone() -> None:
    assert meteor(["cats"], ["cat"]) == pytest.approx(0.5)
    assert meteor(["cat" * 30 + "s"], ["cat" * 30]) == 0.0
    assert meteor(["y" * 100_000], ["ies" * 50_000]) == 0.0


def test_words_split_chinese_into_characters_and_take_a_segmenter() -> None:
    assert words("OCR 这个 page，好") == ["OCR", "这", "个", "page，", "好"]
    assert words("a  b\n c", segment=lambda text: text.split(" ")) == ["a", "b\n", "c"]
    assert evaluate_ocr([record("这个")], ["这好"])["f1"] == pytest.approx(0.5)


def test_metrics_are_averaged_over_pages_and_empty_answers_counted() -> None:
    truth = "one two three four five"
    got = evaluate("ocr", [record(truth)] * 2, [f"```\n{truth}\n```", " "])
    assert got == {
        "edit_distance": 0.5,
        "f1": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "bleu": pytest.approx(0.5),
        "meteor": pytest.approx((1 - 0.5 / 5**3) / 2),
        "n": 2,
        "unparsable": 1,
    }


def test_the_truth_as_answer_is_perfect_on_real_lines(data_dir: Path) -> None:
    records = list(load_data(f"ocr:{data_dir}/ocr/lines_uw3/lines.jsonl?images={data_dir}"))
    got = evaluate("ocr", records, [r.target["text"] for r in records])
    assert got["n"] == len(records) > 100
    assert (got["edit_distance"], got["f1"], got["precision"], got["recall"]) == (0.0, 1.0, 1.0, 1.0)
    assert got["unparsable"] == 0
    assert got["meteor"] > 0.9
    shifted = evaluate("ocr", records, [r.target["text"] for r in records[1:] + records[:1]])
    assert shifted["edit_distance"] > 0.5
    assert shifted["f1"] < 0.3


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_text_gives_metrics_between_zero_and_one(answer: str, truth: str) -> None:
    got = evaluate("ocr", [record(truth)], [answer])
    for name in ("edit_distance", "f1", "precision", "recall", "bleu", "meteor"):
        assert 0.0 <= got[name] <= 1.0 + 1e-12
    same = evaluate("ocr", [record(truth.strip())], [truth])
    assert same["f1"] == 1.0 or "<" in truth or "`" in truth


def test_huge_answers_finish() -> None:
    got = evaluate("ocr", [record("hello world")] * 2, ["y " * 2_000_000, "[" * 3_000_000])
    assert got["edit_distance"] > 0.99
