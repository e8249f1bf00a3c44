"""Surprises in the families' released folders: leading tokens, crop or padding, tiles, templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastrl.answers import from_original
from fastrl.batch import Completion, PromptGroup, pack_row
from fastrl.data.records import Record
from fastrl.models import load_policy
from tests.helpers.contract import Pair
from tests.helpers.families import build_family
from tests.helpers.rollouts import picture, record

MakePair = Callable[[str], Pair]


@pytest.mark.parametrize("model_type", ["llava", "llava_next", "llava_next_video"])
def test_a_prompt_begins_with_one_bos_token_whoever_writes_it(make_pair: MakePair, model_type: str) -> None:
    policy = make_pair(model_type).policy
    bos, asked = policy.tokenizer.bos_token_id, record("q", "Where is it?", (picture(84, 56, 1),))
    ids = policy.encode(asked)[0].token_ids.tolist()
    assert ids[0] == bos
    assert ids.count(bos) == 1
    policy.tokenizer.chat_template = "{{ bos_token }}" + policy.tokenizer.chat_template
    assert policy.encode(asked)[0].token_ids.tolist() == ids


def test_a_plain_string_is_the_same_message_as_one_text_part(pair: Pair) -> None:
    """Released LLaVA templates render content given as parts, but drop content given as a string."""
    policy = pair.policy

    def ids(content: Any) -> list[int]:
        return policy.encode(Record("q", "qa", (), ({"role": "user", "content": content},), {}))[0].token_ids.tolist()

    assert ids("How many squares?") == ids([{"type": "text", "text": "How many squares?"}])
    assert "How many squares?" in policy.tokenizer.decode(ids("How many squares?"))


@pytest.mark.parametrize("size", [(112, 56), (56, 112), (90, 70)])
@pytest.mark.parametrize("settings", [(True, True), (False, True)], ids=["padded square", "centre crop"])
def test_the_frame_of_llava_follows_what_the_folders_processor_keeps(
    tmp_path: Path, settings: tuple[bool, bool], size: tuple[int, int]
) -> None:
    """A white box is where ``padded_unit`` states, in the pixels that the tower gets."""
    folder = build_family(tmp_path, "llava")
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"do_pad": settings[0], "do_center_crop": settings[1]}))
    preprocessor = load_policy(folder, device="cpu").preprocessor
    width, height = size
    box = (width // 2 - 12, height // 2 - 8, width // 2 + 16, height // 2 + 12)
    drawn = np.zeros((height, width, 3), dtype=np.uint8)
    drawn[box[1] : box[3], box[0] : box[2]] = 255
    image, view = preprocessor(Image.fromarray(drawn))
    side = image.shape[1]
    found = np.asarray(preprocessor.picture(image)).astype(int)[..., 0]
    rows, columns = np.nonzero(found > 170)
    seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    message = [part * side for part in from_original(box, "padded_unit", view)]
    assert seen == pytest.approx(message, abs=1.0)
    assert (view.canvas is None or view.canvas[0] < 0 or view.canvas[1] < 0) is settings[0]


def test_onevisions_picture_alone_is_not_the_same_picture_among_others(make_pair: MakePair) -> None:
    """A single picture is tiled. Keys, tokens and features of both forms are kept apart, even within one packed row."""
    pair = make_pair("llava_onevision")
    policy, shared = pair.policy, picture(84, 60, 1)
    asked = [record("a", "Where is it?", (shared,)), record("b", "And here?", (shared, picture(56, 112, 2)))]
    prompts = [policy.encode(one)[0] for one in asked]
    alone, among = prompts[0].images[0], prompts[1].images[0]
    assert alone.key != among.key
    assert policy.family.tokens(alone) > policy.family.tokens(among)
    answer = torch.tensor([5, 9, 40])
    batch = pack_row([PromptGroup(prompt, [Completion(answer)]) for prompt in prompts])
    with torch.no_grad():
        got = policy.logprob(batch).logp
        want = [
            pair.oracle.logp("".join(p for p, _ in policy.encoder._pieces(one, True)), one.images, answer)  # type: ignore[arg-type]
            for one in asked
        ]
    torch.testing.assert_close(got, torch.cat(want), rtol=pair.tolerance, atol=pair.tolerance)


@pytest.mark.parametrize("stated", [True, False, None])
def test_internvl_cuts_tiles_whatever_its_file_states(tmp_path: Path, stated: bool | None) -> None:
    """The released processor requests tiles in every call, even if its file says otherwise."""
    folder = build_family(tmp_path, "internvl")
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text())
    values.pop("crop_to_patches", None)
    file.write_text(json.dumps(values if stated is None else values | {"crop_to_patches": stated}))
    policy = load_policy(folder, device="cpu")
    image, _ = policy.preprocessor(picture(84, 28, 1))
    assert image.shape == (1, 3)
    assert len(image.pixel_values) == 4  # three tiles and the whole picture


def test_a_sampled_answer_has_the_same_ids_when_it_is_encoded_again(pair: Pair) -> None:
    """LLaVA and SmolVLM put a space before an answer; if it stayed in the text, lists and dialogues would have two."""
    policy = pair.policy
    ids = policy.encode_text("a cat")
    assert policy.decode(ids) == "a cat"
    assert policy.encode_text(policy.decode(ids)).tolist() == ids.tolist()
