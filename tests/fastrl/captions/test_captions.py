"""Captions: the parser on scenes (exact), sentences and hostile text; fact matching; CHAIR against manual counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from fastrl.captions import (
    CAPTURE_WEIGHTS,
    Facts,
    Truth,
    chair,
    compare,
    embedding_similarity,
    mentioned_categories,
    parse_caption,
    truth_of,
    weighted_f1,
)
from fastrl.captions.coco import CATEGORIES
from fastrl.captions.embedding import open_similarity
from fastrl.critics import Case, open_critic
from fastrl.data import load_data
from fastrl.data.records import Record, question
from fastrl.data.scenes.world import COLORS, KINDS
from fastrl.evaluate import evaluate
from fastrl.evaluate.during import held_out
from fastrl.evaluate.run import caption_similarity, run_evaluation
from fastrl.rewards.answer import Answer
from tests.helpers.training import make_recipe


@pytest.mark.parametrize("difficulty", [1, 2, 4])
def test_every_true_scene_caption_scores_one(difficulty: int) -> None:
    for record in load_data(f"scenes:caption?n=150&seed=8&difficulty={difficulty}"):
        truth = truth_of(record.target, record.id)
        matches = compare(parse_caption(record.target["references"][0]), truth)
        assert weighted_f1(matches) == 1.0, record.target["references"][0]
        assert not any(m.wrong or m.missing for m in matches.values())


def test_a_wrong_colour_a_surplus_and_a_missing_shape_are_each_seen() -> None:
    truth = Truth((parse_caption("A large red circle. A small blue square below the red circle."),), exact=True)
    colour = compare(parse_caption("A large red circle. A small green square below the red circle."), truth)
    assert colour["attributes"].wrong == (("square", "green"),)
    assert colour["attributes"].precision == pytest.approx(3 / 4)
    assert colour["objects"].f1 == colour["relations"].f1 == 1.0
    twice = compare(
        parse_caption("A large red circle. A large red circle. A small blue square below the red circle."), truth
    )
    assert twice["objects"].wrong == ("circle",)
    less = compare(parse_caption("A large red circle."), truth)
    assert less["objects"].recall == 0.5
    assert less["relations"].missing == (("square", "below", "circle"),)
    # 5:2:2 of F1: objects 2/3, attributes 2/3, relations 0
    assert weighted_f1(less) == pytest.approx((5 * 2 / 3 + 2 * 2 / 3) / 9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man riding a brown horse.", Facts(("man", "horse"), (("horse", "brown"),), (("man", "rid", "horse"),))),
        (
            "Two dogs next to a red car",
            Facts(("dog", "car"), (("dog", "2"), ("car", "red")), (("dog", "next to", "car"),)),
        ),
        (
            "The cat is black and it sits on the couch.",
            Facts(("cat", "couch"), (("cat", "black"),), (("cat", "on", "couch"),)),
        ),
        ("There are no people in the image.", Facts((), (), ())),
        ("A dog without a collar on grass", Facts(("dog", "grass"), (), (("dog", "on", "grass"),))),
        ("A dog. The dog is brown. A cat.", Facts(("dog", "cat"), (("dog", "brown"),), ())),
        ("A cross to the left of a star", Facts(("cross", "star"), (), (("cross", "left of", "star"),))),
        (
            "A hot dog on a green plate.",
            Facts(("hot dog", "plate"), (("plate", "green"),), (("hot dog", "on", "plate"),)),
        ),
        (
            "A family slowly watches a butterfly",
            Facts(("family", "butterfly"), (), (("family", "watch", "butterfly"),)),
        ),
        ("", Facts((), (), ())),
    ],
)
def test_sentences(text: str, expected: Facts) -> None:
    assert parse_caption(text) == expected


@given(st.text(max_size=300))
def test_any_text_parses(text: str) -> None:
    facts = parse_caption(text)
    assert {o for o, _ in facts.attributes} <= set(facts.objects)
    mentioned_categories(text)


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(sorted(COLORS))), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_scores_are_bounded_and_do_not_depend_on_order(shapes: list[tuple[str, str]], rng: object) -> None:
    facts = parse_caption(" ".join(f"A {color} {kind}." for kind, color in shapes))
    assert facts.objects == tuple(kind for kind, _ in shapes)
    turned = parse_caption(" ".join(f"A {color} {kind}." for kind, color in reversed(shapes)))
    assert weighted_f1(compare(turned, Truth((facts,), exact=True))) == 1.0
    other = parse_caption("A red circle. A blue circle above the red circle.")
    assert 0.0 <= weighted_f1(compare(facts, Truth((other,), exact=True))) <= 1.0


def test_long_text_is_read_in_bounded_work() -> None:
    facts = parse_caption("a red dog on " * 200_000)
    assert len(facts.objects) <= 200


def test_references_say_what_is_there_not_how_often() -> None:
    truth = Truth((parse_caption("A dog on a couch. A dog."), parse_caption("A puppy lying on a sofa.")), exact=False)
    matches = compare(parse_caption("A dog on a couch and a dog."), truth)
    assert matches["objects"].precision == 1.0  # synonyms of the second reference count
    half = compare(parse_caption("A dog and a car."), truth)
    assert half["objects"].precision == 0.5
    assert half["objects"].wrong == ("car",)


def test_soft_matching_adds_similarity_of_what_is_left() -> None:
    truth = Truth((Facts(("boat", "lake"), (), ()),), exact=False)
    caption = Facts(("boat", "pond", "tree"), (), ())
    hard = compare(caption, truth)["objects"]
    assert (hard.precision, hard.recall) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    table = {("pond", "lake"): 0.9, ("tree", "lake"): 0.2}
    soft = compare(caption, truth, lambda a, b: [[table[x, y] for y in b] for x in a])["objects"]
    assert soft.precision == pytest.approx((1 + 0.9 + 0.2) / 3)
    assert soft.recall == pytest.approx((1 + 0.9) / 2)


def test_embedding_similarity_is_a_cosine_cut_at_zero() -> None:
    class Model:
        def encode(self, texts: list[str]) -> list[list[float]]:
            return [{"a": [2.0, 0.0], "b": [1.0, 1.0], "c": [-1.0, 0.0]}[t] for t in texts]

    table = embedding_similarity(Model())(["a"], ["a", "b", "c"])
    assert table[0] == pytest.approx([1.0, 0.5**0.5, 0.0])


def test_a_model_folder_matches_softly_from_the_critic_and_the_protocol(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "boat", "lake", "pond", "a", "on", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), **sizes)
    BertModel(config).save_pretrained(tmp_path)
    similarity = open_similarity(str(tmp_path))
    alone, together = similarity(["boat"], ["lake"])[0][0], similarity(["boat", "a boat on the lake"], ["lake"])[0][0]
    assert alone == pytest.approx(together, abs=1e-5)  # padding belongs to no phrase
    assert similarity(["boat"], ["boat"])[0][0] == pytest.approx(1.0)
    record = Record("r", "caption", (), question("caption"), {"references": ["A boat on the lake."]})
    message = "A boat on the pond."
    (hard,), (soft,) = (open_critic(s).score([Case(record, message)]) for s in ("rule", f"rule?soft={tmp_path}"))
    assert hard.score is not None
    assert soft.score is not None
    assert hard.score < soft.score < 1
    named = {"eval__spec": "given:records", "eval__soft": str(tmp_path), "eval__samples": 0}
    measured = held_out(make_recipe(tmp_path, tmp_path / "run", **named), [record])
    assert measured is not None
    answers = {"caption": [Answer(message, [], record)]}
    assert measured.metrics(answers)["score"] == pytest.approx(soft.score)
    ocr = Record("o", "ocr", (Image.new("RGB", (28, 28)),), question("ocr"), {"text": "x"})
    with pytest.raises(ValueError, match=r"eval\.soft: matches words of captions; eval\.spec has ocr"):
        held_out(make_recipe(tmp_path, tmp_path / "run", **named), [ocr])
    (tmp_path / "c.jsonl").write_text(json.dumps({"references": ["A boat on the lake."], "id": "r"}))
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "r", "answer": message}))
    spec, found = f"captions:{tmp_path}/c.jsonl?images=none", {}
    for folder in (None, str(tmp_path)):
        found[folder] = run_evaluation("caption", spec, predictions=tmp_path / "a.jsonl", soft=folder)
    assert [found[f]["matching"] for f in found] == ["rules", f"rules, then {tmp_path}"]
    assert [found[f]["score"] for f in found] == pytest.approx([hard.score, soft.score])
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("embeddings.word_embeddings.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1, the first: embeddings\.word_embeddings\.weight"):
        open_similarity(str(tmp_path))
    assert evaluate("caption", [record], [message], similarity=similarity)["score"] == pytest.approx(soft.score)
    with pytest.raises(ValueError, match="no sentence-embedding model"):
        open_critic(f"rule?soft={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="captions"):
        caption_similarity("ocr", str(tmp_path))


def test_capture_weights_are_normalised() -> None:
    truth = Truth((Facts(("dog",), (("dog", "red"),), (("dog", "on", "mat"),)),), exact=True)
    caption = Facts(("dog",), (("dog", "red"),), (("dog", "under", "car"),))
    assert weighted_f1(compare(caption, truth), CAPTURE_WEIGHTS) == pytest.approx(1 / 1.2)


def test_a_record_without_truth_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"r7.*references"):
        truth_of({}, "r7")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two puppies and a motor bike", ["dog", "motorcycle"]),
        ("A hot dog on a plate", ["hot dog"]),
        ("An orange cat eats an orange.", ["cat", "orange"]),
        ("People wait at the train tracks near home plate", ["person"]),
        ("A teddy bear, a wine glass and a cell phone", ["teddy bear", "wine glass", "cell phone"]),
        ("A man with a tennis racquet", ["person", "tennis racket"]),
        ("an empty street", []),
    ],
)
def test_mentioned_categories(text: str, expected: list[str]) -> None:
    assert mentioned_categories(text) == expected


def test_every_category_is_found_by_its_own_name_and_plural() -> None:
    assert len(CATEGORIES) == 80
    plurals = {
        "person": "people",
        "bus": "buses",
        "bench": "benches",
        "mouse": "mice",
        "sheep": "sheep",
        "skis": "skis",
    }
    plurals |= {"knife": "knives", "couch": "couches", "scissors": "scissors", "wine glass": "wine glasses"}
    plurals |= {"broccoli": "broccoli", "sandwich": "sandwiches", "toothbrush": "toothbrushes"}
    for name in CATEGORIES:
        assert mentioned_categories(f"There is a {name} here.") == [name]
        assert mentioned_categories(f"Some {plurals.get(name, name + 's')}.") == [name]


def test_chair_against_a_hand_count() -> None:
    captions = ["A dog and a cat on a sofa.", "A man rides a bike.", "Nothing."]
    present = [["dog", "couch"], ["person", "bicycle"], ["car"]]
    result = chair(captions, present)
    assert (result.mentions, result.hallucinated) == (5, 1)
    assert result.chair_i == pytest.approx(1 / 5)
    assert result.chair_s == pytest.approx(1 / 3)
    assert chair([], []).chair_i == 0.0
    with pytest.raises(ValueError, match="1 captions but objects of 0"):
        chair(["a"], [])


def test_real_captions_hallucinate_as_models_do(data_dir: Path) -> None:
    rows = [json.loads(line) for line in (data_dir / "text" / "pope_model_captions.jsonl").open()]
    rates: dict[str, float] = {}
    for name in ("human", "llava", "minigpt-4"):
        captions, present = [], []
        for row in rows:
            message = row["human_captions"]
            mine = (
                message[-1:] if name == "human" else [c["caption"] for c in row["model_captions"] if c["model"] == name]
            )
            others = message[:-1] if name == "human" else message
            for caption in mine:
                captions.append(caption)
                present.append({c for text in others for c in mentioned_categories(text)})
        rates[name] = chair(captions, present).chair_i
    assert rates["human"] < rates["llava"]
    assert rates["human"] < rates["minigpt-4"]
