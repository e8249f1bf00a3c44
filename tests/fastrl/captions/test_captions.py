"""Captions: the parser on scenes (exact), sentences and hostile text; fact matching; CHAIR against manual counts."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from fastrl.captions import (
    CAPTURE_WEIGHTS,
    Facts,
    OfReferences,
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
from fastrl.captions.embedding import PUBLISHED, Soft, open_similarity, open_soft
from fastrl.critics import Case, open_critic
from fastrl.data import load_data
from fastrl.data.records import Record, question
from fastrl.data.scenes.world import COLORS, KINDS
from fastrl.evaluate import evaluate
from fastrl.evaluate.during import Evaluation, held_out
from fastrl.evaluate.run import run_evaluation
from fastrl.evaluate.soft import caption_soft
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


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny sentence-embedding model."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("embedder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "boat", "lake", "pond", "a", "on", "the"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), intermediate_size=32, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache. Whatever asks the network fails the test, though the hub is not said to be offline."""
    import huggingface_hub.constants

    def asked(*place: Any, **options: Any) -> Any:
        raise AssertionError(f"asked the network for {place}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    return tmp_path / "hub"


def download(embedder: Path, hub: Path) -> None:
    """Put CAPTURE's model, as it were, into the hub cache."""
    place, commit = hub / f"models--{PUBLISHED.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(embedder, place / "snapshots" / commit)


SAID = "A boat on the pond."
BOAT = Record("r", "caption", (), question("caption"), {"references": ["A boat on the lake."]})


def rule_score(critic: str, record: Record = BOAT, said: str = SAID) -> float:
    (critique,) = open_critic(critic).score([Case(record, said)])
    assert critique.score is not None
    return critique.score


def eval_metrics(folder: Path, soft: str | None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """``fastrl eval`` of the boat's caption."""
    (folder / "c.jsonl").write_text(json.dumps({**BOAT.target, "id": "r"}))
    (folder / "a.jsonl").write_text(json.dumps({"id": "r", "answer": SAID}))
    spec = f"captions:{folder}/c.jsonl?images=none"
    return run_evaluation("caption", spec, predictions=folder / "a.jsonl", soft=soft, say=say)


def test_a_model_folder_matches_softly_from_the_critic_and_the_protocol(embedder: Path, tmp_path: Path) -> None:
    similarity = open_similarity(str(embedder))
    alone, together = similarity(["boat"], ["lake"])[0][0], similarity(["boat", "a boat on the lake"], ["lake"])[0][0]
    assert alone == pytest.approx(together, abs=1e-5)  # padding belongs to no phrase
    assert similarity(["boat"], ["boat"])[0][0] == pytest.approx(1.0)
    hard, soft = rule_score("rule"), rule_score(f"rule?soft={embedder}")
    assert hard < soft < 1
    assert rule_score("rule?soft=none") == hard
    named = {"eval__spec": "given:records", "eval__soft": str(embedder), "eval__samples": 0}
    measured = held_out(make_recipe(tmp_path, tmp_path / "run", **named), [BOAT])
    assert measured is not None
    answers = {"caption": [Answer(SAID, [], BOAT)]}
    assert measured.metrics(answers)["score"] == pytest.approx(soft)
    ocr = Record("o", "ocr", (Image.new("RGB", (28, 28)),), question("ocr"), {"text": "x"})
    with pytest.raises(ValueError, match=r"eval\.soft: matches words of captions; eval\.spec has ocr"):
        held_out(make_recipe(tmp_path, tmp_path / "run", **named), [ocr])
    found = [eval_metrics(tmp_path, soft) for soft in (None, "none", str(embedder))]
    assert [each["matching"] for each in found] == ["rules", "rules", f"rules, then {embedder}"]
    assert [each["score"] for each in found] == pytest.approx([hard, hard, soft])
    assert evaluate("caption", [BOAT], [SAID], similarity=similarity)["score"] == pytest.approx(soft)


def test_a_model_that_cannot_be_loaded_is_refused(embedder: Path, hub: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(embedder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights.pop("embeddings.word_embeddings.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1, the first: embeddings\.word_embeddings\.weight"):
        open_similarity(str(folder))
    with pytest.raises(ValueError, match="no sentence-embedding model"):
        open_critic(f"rule?soft={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="in 'nowhere': neither a folder nor the name of a downloaded model"):
        open_soft("nowhere")
    with pytest.raises(ValueError, match="captions"):
        caption_soft("ocr", str(embedder), free=False)
    assert caption_soft("ocr", "auto", free=False) == Soft()


def test_evaluations_match_softly_where_capture_s_model_is_there(embedder: Path, hub: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    rules = eval_metrics(tmp_path, "auto", lines.append)
    note = next(line for line in lines if "soft matching" in line)
    assert note.startswith(f"soft matching of captions is off: {PUBLISHED} is not on this machine; get it with `hf ")
    assert rules["matching"] == "rules"
    assert rules == eval_metrics(tmp_path, "none")
    download(embedder, hub)
    softly = eval_metrics(tmp_path, "auto", lines.append)
    assert softly["matching"] == f"rules, then {PUBLISHED}"
    assert softly["score"] == pytest.approx(eval_metrics(tmp_path, str(embedder))["score"])
    assert softly["score"] > rules["score"]
    assert sum("soft matching" in line for line in lines) == 1
    # A reward does not depend on what is on the machine unless that is asked for
    assert rule_score("rule") == pytest.approx(rules["score"])
    assert rule_score("rule?soft=auto") == pytest.approx(softly["score"])
    run = tmp_path / "run"
    kept = {}
    for soft in ("auto", "none"):
        recipe = make_recipe(tmp_path, run, eval__spec="given:records", eval__samples=0, eval__soft=soft)
        measured = held_out(recipe, [BOAT])
        assert measured is not None
        kept[soft] = measured.metrics({"caption": [Answer(SAID, [], BOAT)]})["score"]
    assert kept == pytest.approx({"auto": softly["score"], "none": rules["score"]})


def test_what_is_on_the_machine_changes_no_score_of_a_scene(embedder: Path, hub: Path, tmp_path: Path) -> None:
    spec, path = "scenes:caption?n=8&seed=3", tmp_path / "a.jsonl"
    records = load_data(spec)
    said = [f"There is a boat and a purple lake. {record.target['objects'][0]}." for record in records]
    path.write_text(
        "".join(json.dumps({"id": r.id, "answer": text}) + "\n" for r, text in zip(records, said, strict=True))
    )
    download(embedder, hub)
    lines: list[str] = []
    auto = run_evaluation("caption", spec, predictions=path, say=lines.append)
    assert auto == run_evaluation("caption", spec, predictions=path, soft="none")
    assert auto["matching"] == "rules"
    assert not any("soft" in line for line in lines)
    assert run_evaluation("caption", spec, predictions=path, soft=str(embedder))["score"] > auto["score"]  # as asked
    # Also among records with references, and for a critic
    both = [BOAT, records[0]]
    similarity = open_similarity(str(embedder))
    scores: list[Any] = [
        evaluate("caption", both, [SAID, said[0]], similarity=each)["score"]
        for each in (None, OfReferences(similarity), similarity)
    ]
    assert scores[0] < scores[1] < scores[2]
    assert rule_score("rule?soft=auto", records[0], said[0]) == rule_score("rule", records[0], said[0])


def test_a_broken_download_is_said(embedder: Path, hub: Path) -> None:
    download(embedder, hub)
    next(hub.rglob("model.safetensors")).unlink()
    soft = open_soft("auto")
    assert soft.similarity is None
    assert soft.note.startswith("soft matching of captions is off: no sentence-embedding model in ")


def test_a_resumed_run_that_matches_otherwise_starts_its_best_anew(embedder: Path, hub: Path, tmp_path: Path) -> None:
    def evaluation() -> Evaluation:
        recipe = make_recipe(tmp_path, tmp_path / "run", eval__spec="given:records", eval__samples=0)
        return Evaluation(recipe, held_out(recipe, [BOAT]), None, None)  # type: ignore[arg-type]

    before = evaluation()
    before._last = 1
    assert "is off" in before.matching
    download(embedder, hub)
    after = evaluation()
    assert after.matching == f"eval.soft: captions are matched by rules, then {PUBLISHED}"
    after.load(before.state())
    assert after.note.startswith("the evaluation set or metric has changed")


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
