"""OCR evaluation as Perception-R1 reports it: edit distance, word-set F1/precision/recall, BLEU and METEOR per page."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

from fastrl.answers import canonical
from fastrl.data.records import Record
from fastrl.rewards.ocr import Normalise, answer_readings, edit_distance
from fastrl.rewards.reading import MAX_CHARACTERS

MAX_WORDS = 10_000  # words of a text used for BLEU and METEOR; a dense page has about a thousand
MAX_STEM_CHARACTERS = 64  # NLTK before 3.10 recurses along runs of "y"; longer strings are not words

# One token per ideograph or kana, runs of other non-blank characters otherwise.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")

Segmenter = Callable[[str], Sequence[str]]


def words(text: str, segment: Segmenter | None = None) -> list[str]:
    """Tokens of a text: split at white space, and every Chinese or Japanese character on its own.

    The released evaluation segments Chinese with jieba; pass ``segment=jieba.lcut`` to do the same (blank tokens are
    dropped).
    """
    text = text[:MAX_CHARACTERS]
    found = _TOKEN.findall(text) if segment is None else segment(text)
    return [word for word in found if word and not word.isspace()]


def normalised_edit_distance(answer: str, truth: str) -> float:
    """Character edit distance ÷ length of the longer text, in [0, 1], lower is better; two empty texts: 0."""
    longest = max(len(answer), len(truth))
    return edit_distance(answer, truth) / longest if longest else 0.0


def word_set_scores(answer: Sequence[str], truth: Sequence[str]) -> tuple[float, float, float]:
    """(F1, precision, recall) over **sets** of words, each in [0, 1]; 1 when both are empty, 0 when one is."""
    a, b = set(answer), set(truth)
    if not a or not b:
        return (1.0, 1.0, 1.0) if not a and not b else (0.0, 0.0, 0.0)
    common = len(a & b)
    return 2.0 * common / (len(a) + len(b)), common / len(a), common / len(b)


def bleu(answer: Sequence[str], truth: Sequence[str]) -> float:
    """NLTK's sentence BLEU with its defaults: up to 4-grams, uniform weights, no smoothing.

    Without smoothing a text of fewer than four words scores (practically) 0 even against itself.
    """
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # NLTK warns at every missing n-gram order
        return float(sentence_bleu([list(truth[:MAX_WORDS])], list(answer[:MAX_WORDS])))  # type: ignore[arg-type]


class _NoSynonyms:
    """Replaces WordNet, so that METEOR only matches exact words and stems, and nothing is downloaded."""

    def synsets(self, word: str) -> list[object]:
        return []


class _BoundedStemmer:
    """Porter's stemmer on words, the identity on strings too long to be words."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stemmer = PorterStemmer()

    def stem(self, word: str) -> str:
        return self._stemmer.stem(word) if len(word) <= MAX_STEM_CHARACTERS else word


def meteor(answer: Sequence[str], truth: Sequence[str]) -> float:
    """METEOR (Lavie and Agarwal 2007; NLTK, α 0.9, β 3, γ 0.5) with exact and Porter-stem matching, no synonyms.

    A text of m words scores 1 − 0.5/m³ against itself, because the fragmentation penalty counts it as one chunk.
    """
    from nltk.translate.meteor_score import single_meteor_score

    stubs = {"stemmer": _BoundedStemmer(), "wordnet": _NoSynonyms()}
    return float(single_meteor_score(list(truth[:MAX_WORDS]), list(answer[:MAX_WORDS]), **stubs))  # type: ignore[arg-type]


def evaluate_ocr(
    records: Sequence[Record],
    answers: Sequence[str],
    *,
    segment: Segmenter | None = None,
    normalise: Normalise = "nfc",
) -> dict[str, float]:
    """Means over pages of ``edit_distance f1 precision recall bleu meteor``; an empty answer counts as unparsable.

    Answers are read like in the reward (``rewards.ocr.answer_readings``); of two readings, the one closer to the page
    is used. White space at the ends does not count. White space inside is kept, unlike in the reward, as in the
    published metric. ``normalise="none"`` compares answer and page unchanged, as published: without removing tags and
    fences, without Unicode normalisation, including white space at the ends.
    """
    rows: list[tuple[float, ...]] = []
    unparsable = 0
    for record, given in zip(records, answers, strict=True):
        if normalise == "none":
            truth, texts = record.target["text"], [given]
        else:
            truth, texts = canonical(record.target["text"].strip()), answer_readings(given, record.target["text"])
        unparsable += not any(text.strip() for text in texts)
        readings = {text: normalised_edit_distance(text, truth) for text in texts}
        answer = min(readings, key=readings.__getitem__)
        a, b = words(answer, segment), words(truth, segment)
        rows.append((readings[answer], *word_set_scores(a, b), bleu(a, b), meteor(a, b)))
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    result = dict(zip(("edit_distance", "f1", "precision", "recall", "bleu", "meteor"), means, strict=True))
    return {**result, "n": len(rows), "unparsable": unparsable}
