"""Attention read-out: against probabilities computed from queries and keys in float64, and the saved files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import fastrl.models.attention.readout as readout
from fastrl.batch import PromptGroup, pack_row
from fastrl.data.records import Record, question
from fastrl.data.reflection import SpokenTurn, dialogue_messages
from fastrl.evaluate.reflect import evaluate_reflection, reflect_on_image
from fastrl.models.attention.readout import TurnAttention, read_attention, save_attention
from fastrl.models.load import Policy, load_policy
from fastrl.models.policy import packed_states
from fastrl.report.figures import heat_maps

TURNS = (SpokenTurn("A red circle.", 0.2, "Better?"), SpokenTurn("A square.", 0.5, "Again?"), SpokenTurn("Blue.", 0.9))


def dialogue(images: int = 1) -> Record:
    pictures = tuple(Image.new("RGB", (84 if n else 56, 56), (200, 30 * n, 30)) for n in range(images))
    asked = question("caption", images=images, prompt="Describe.")
    return Record("d", "caption", pictures, dialogue_messages(asked, TURNS), {})


@pytest.fixture(params=["qwen2_5", "qwen2"])
def policy(tiny_folder: Callable[[str], Path], request: pytest.FixtureRequest) -> Policy:
    return load_policy(tiny_folder(request.param), dtype=torch.float32)


def by_hand(query: Tensor, key: Tensor, row: int, columns: list[int]) -> list[float]:
    """Mean over heads of one row's probabilities for ``columns``: [H, L, D] queries, [Hkv, L, D] keys."""
    total = [0.0] * len(columns)
    for head in range(len(query)):
        shared = key[head * len(key) // len(query)].double()
        scores = [float(query[head, row].double() @ shared[j]) / math.sqrt(query.shape[-1]) for j in range(row + 1)]
        norm = sum(math.exp(s - max(scores)) for s in scores)
        for place, j in enumerate(columns):
            total[place] += math.exp(scores[j] - max(scores)) / norm / len(query)
    return total


def test_mass_and_maps_are_the_probabilities_worked_out_by_hand(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, kept = dialogue(2), []
    attend = readout._attention

    def keep(module: Any, query: Tensor, key: Tensor, *rest: Any, **kwargs: Any) -> Any:
        kept.append((query[0].clone(), key[0].clone()))
        return attend(module, query, key, *rest, **kwargs)

    monkeypatch.setattr(readout, "_attention", keep)
    found = read_attention(policy, record)
    prompt, completion, _ = policy.encode_dialogue(record)
    columns = [start + n for start, length in prompt.image_slots for n in range(length)]
    turn = completion.per_token["turn"].tolist()
    assert len(found) == len(TURNS)
    for number, attention in enumerate(found):
        rows = [len(prompt.token_ids) + k - 1 for k, t in enumerate(turn) if t == number]  # what predicts each token
        layers = [
            torch.tensor([by_hand(q, k, row, columns) for row in rows], dtype=torch.float64).mean(0) for q, k in kept
        ]
        expected = torch.stack(layers)
        assert attention.mass == pytest.approx(float(expected.sum(1).mean()), rel=1e-5)
        assert attention.by_layer == pytest.approx(expected.sum(1).tolist(), rel=1e-5)
        cells = torch.cat([m.flatten() for m in attention.maps]).double()
        torch.testing.assert_close(cells, expected.mean(0), rtol=1e-5, atol=1e-8)
        assert 0 < attention.mass < 1
        assert sum(float(m.sum()) for m in attention.maps) == pytest.approx(attention.mass, rel=1e-5)
    # cells are laid out as in the pictures: 28 pixels each
    assert [tuple(m.shape) for m in found[0].maps] == [(2, 2), (2, 3)]


def test_the_eager_pass_computes_what_the_model_computes(policy: Policy) -> None:
    """Later positions are masked: hidden states are those of prefix-shared attention."""
    prompt, completion, _ = policy.encode_dialogue(dialogue())
    batch = pack_row([PromptGroup(prompt, [completion])])
    before = policy.core.model.language_model.config._attn_implementation
    with torch.no_grad(), readout._eager(policy):
        probe = readout._Probe(batch.image_rows, [batch.predict_rows])
        eager = packed_states(policy.core, batch, fastrl_probe=probe)
    assert policy.core.model.language_model.config._attn_implementation == before
    with torch.no_grad():
        torch.testing.assert_close(eager[0, batch.predict_rows], policy.hidden(batch), rtol=1e-4, atol=1e-5)


def test_a_record_without_pictures_or_an_answer_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match="no image"):
        read_attention(policy, dialogue(0))
    with pytest.raises(ValueError, match="assistant"):
        read_attention(policy, replace(dialogue(), messages=question("caption", prompt="Describe.")))


def test_means_are_over_the_dialogues_that_reach_a_turn(tmp_path: Path) -> None:
    def turn(mass: float) -> TurnAttention:
        return TurnAttention(mass, (mass,), (torch.full((2, 2), mass / 4),))

    long, short = [turn(0.2), turn(0.6)], [turn(0.4)]
    summary = save_attention([(dialogue(), long), (dialogue(), short)], tmp_path, draw=heat_maps)
    assert summary["mean_mass"] == pytest.approx([0.3, 0.6])
    written = json.loads((tmp_path / "attention.json").read_text())
    assert written["records"][0]["turns"][1]["maps"] == [[[pytest.approx(0.15)] * 2] * 2]
    assert written["records"][1]["turns"][0]["by_layer"] == [0.4]
    with Image.open(tmp_path / "attention.png") as picture:
        assert min(picture.size) > 200


def test_from_the_commands(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    Image.new("RGB", (56, 56), (255, 0, 0)).save(tmp_path / "a.png")
    model, message = str(tiny_folder("qwen2_5")), list[str]()
    row = reflect_on_image(
        tmp_path / "a.png", "Describe.", model=model, critic="rule", turns=2, references=["A red square."],
        max_new_tokens=4, attention=tmp_path / "one", draw=heat_maps, say=message.append,
    )  # fmt: skip
    assert len(row["attention"]) == 2
    assert message[-1].startswith("attention on the image by turn: 0.")
    assert (tmp_path / "one" / "attention.png").is_file()
    metrics = evaluate_reflection(
        "scenes:caption?n=2&seed=6", model=model, turns=2, max_new_tokens=4, attention=tmp_path / "two"
    )
    written = json.loads((tmp_path / "two" / "attention.json").read_text())
    assert written["mean_mass"] == [metrics["turn1/image_attention"], metrics["turn2/image_attention"]]
    assert written["dialogues"] == 2
