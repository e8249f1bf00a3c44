"""Temporal perplexity: against transformers alone, independent of the batch, each frame encoded once; and the run."""

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

from fastrl.build.utr import BuildOptions, build_dialogues
from fastrl.data import load_data
from fastrl.data.records import Record, question
from fastrl.evaluate.tpl import TemporalPerplexity, frame_subset, greyed, temporal_perplexity
from fastrl.evaluate.tpl_run import TplOptions, keep_top, run_tpl
from fastrl.models import Policy, load_policy
from fastrl.report.tpl import draw_tpl, mean_curve


def picture(seed: int, size: int = 56) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8).numpy())


def clip(name: str, frames: int, answer: str = "A red circle moves.", seed: int = 0) -> Record:
    images = tuple(picture(100 * seed + t) for t in range(frames))
    asked = question("trajectory", images=frames, prompt="What happens?", seconds=[0.5 * t for t in range(frames)])
    return Record(name, "trajectory", images, asked, {"answer": answer})


@pytest.fixture(scope="module")
def policy(tiny_folder: Callable[[str], Path]) -> Policy:
    return load_policy(tiny_folder("qwen2_5"), device="cpu")


# ---- the score


def test_scores_are_transformers_own_on_each_subset(policy: Policy, tiny_folder: Callable[[str], Path]) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_folder("qwen2_5")).eval()
    row = clip("a", 3)
    (found,) = temporal_perplexity(policy, [row], single="best", samples=1)
    answer = torch.tensor(policy.tokenizer("A red circle moves.")["input_ids"])

    def score(numbers: list[int]) -> float:
        """Mean log-prob of the answer after a prompt written by hand."""
        labels = [f"Frame{t} {0.5 * (t - 1):g}s:<|vision_start|><|image_pad|><|vision_end|>" for t in numbers]
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"{''.join(labels)}What happens?<|im_end|>\n<|im_start|>assistant\n"
        )
        images = [policy.preprocessor(row.images[t - 1])[0] for t in numbers]
        text = text.replace("<|image_pad|>", "<|image_pad|>" * policy.family.tokens(images[0]))
        prompt = torch.tensor(policy.tokenizer(text)["input_ids"])
        ids = torch.cat([prompt, answer])[None]
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                mm_token_type_ids=(ids == model.config.image_token_id).long(),
                pixel_values=torch.cat([image.pixel_values for image in images]),
                image_grid_thw=torch.tensor([image.shape for image in images]),
                use_cache=False,
            ).logits[0]
        logp = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, answer[:, None])
        return float(logp.mean())

    assert found.full == pytest.approx(score([1, 2, 3]), abs=1e-5)
    assert dict(found.curve) == pytest.approx({t: score([t]) for t in (1, 2, 3)}, abs=1e-5)
    best = max(found.curve, key=lambda t: found.curve[t])
    assert found.chosen == (best,)
    assert found.tpl == pytest.approx(found.full - found.curve[best], abs=1e-6)
    assert (found.frames, found.tokens) == (3, len(answer))


@pytest.mark.parametrize("token_budget", [1, 500, 1 << 20])
def test_the_tower_sees_each_frame_once_however_many_subsets_hold_it(policy: Policy, token_budget: int) -> None:
    seen: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        seen.extend(kwargs["grid_thw"][:, 0].tolist())

    handle = policy.core.model.visual.register_forward_pre_hook(count, with_kwargs=True)
    try:
        # Two clips of 4 different frames each, every frame alone and all together: 10 prompts, 16 image places.
        temporal_perplexity(policy, [clip("a", 4), clip("b", 4, seed=1)], single="best", token_budget=token_budget)
        assert len(seen) == 8
        seen.clear()
        # Two questions about one clip in succession: its frames are cached.
        temporal_perplexity(policy, [clip("a", 4), clip("b", 4, "Other.")], curve=True, token_budget=token_budget)
        assert len(seen) == 4
    finally:
        handle.remove()


def test_tpl_does_not_depend_on_the_other_records_or_the_packing(policy: Policy) -> None:
    rows = [clip("a", 5), clip("b", 2, "Yes.", seed=1), clip("c", 3, "It stays, then it moves up.", seed=2)]
    together = {r.id: r for r in temporal_perplexity(policy, rows, samples=2, seed=7)}
    for row in rows:
        (alone,) = temporal_perplexity(policy, [row], samples=2, seed=7)
        assert alone.chosen == together[row.id].chosen
        assert alone.tpl == pytest.approx(together[row.id].tpl, abs=1e-5)
    for budget in (1, 300, 1 << 20):
        for found in temporal_perplexity(policy, rows[::-1], samples=2, seed=7, token_budget=budget):
            assert found.tpl == pytest.approx(together[found.id].tpl, abs=1e-5)


def test_which_frames_stand_for_one(policy: Policy) -> None:
    row = clip("a", 6)
    choices = {how: temporal_perplexity(policy, [row], single=how)[0] for how in ("first", "middle", "last", "best")}
    assert [choices[how].chosen for how in ("first", "middle", "last")] == [(1,), (3,), (6,)]
    assert len(choices["best"].curve) == 6
    assert choices["best"].tpl == pytest.approx(min(r.full - s for r in choices.values() for s in r.curve.values()))
    (few,) = temporal_perplexity(policy, [row], samples=4)
    assert len(set(few.chosen)) == 4
    assert set(few.curve) == set(few.chosen)
    (all_of_them,) = temporal_perplexity(policy, [row], samples=99)
    assert all_of_them.chosen == (1, 2, 3, 4, 5, 6)
    assert all_of_them.tpl == pytest.approx(all_of_them.full - math.fsum(choices["best"].curve.values()) / 6, abs=1e-6)
    assert temporal_perplexity(policy, [row], samples=4, seed=1)[0].chosen != few.chosen
    (curved,) = temporal_perplexity(policy, [row], samples=1, curve=True)
    assert len(curved.curve) == 6
    assert curved.tpl == pytest.approx(curved.full - curved.curve[curved.chosen[0]], abs=1e-6)


def test_the_perplexity_form_is_the_mean_of_perplexities_less_that_of_all(policy: Policy) -> None:
    row = clip("a", 3)
    (log,) = temporal_perplexity(policy, [row], samples=3)
    (ppl,) = temporal_perplexity(policy, [row], samples=3, form="ppl")
    expected = sum(math.exp(-log.curve[t]) for t in (1, 2, 3)) / 3 - math.exp(-log.full)
    assert ppl.tpl == pytest.approx(expected, rel=1e-5)


def test_one_frame_leaves_nothing_to_gain(policy: Policy) -> None:
    (single,) = temporal_perplexity(policy, [clip("a", 1)])
    assert single.tpl == pytest.approx(0.0, abs=1e-6)
    assert single.explaining() == [1]


def test_the_truth_is_written_where_a_record_has_no_answer(policy: Policy) -> None:
    (row,) = load_data("scenes:trajectory?n=1&frames=3&size=56")
    (found,) = temporal_perplexity(policy, [row])
    assert found.tokens > 20
    with pytest.raises(ValueError, match=r"record 'a': an empty answer"):
        temporal_perplexity(policy, [clip("a", 2, "")])
    with pytest.raises(ValueError, match="has no images"):
        temporal_perplexity(policy, [Record("a", "trajectory", (), question("ocr", images=0), {"answer": "x"})])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"single": "frist"}, "--single: unknown choice 'frist'; did you mean 'first'"),
        ({"form": "nats"}, "--form: unknown choice 'nats'.*known: log, ppl"),
        ({"samples": 0}, "--samples: expected at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(policy: Policy, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        temporal_perplexity(policy, [clip("a", 2)], **options)


def test_a_subset_keeps_each_frame_with_its_label() -> None:
    row = clip("a", 4)
    kept = frame_subset(row, [2, 4])
    (turn,) = kept.messages
    texts = [part.get("text", "image") for part in turn["content"]]
    assert texts == ["Frame2 0.5s:", "image", "Frame4 1.5s:", "image", "What happens?"]
    assert kept.images == (row.images[1], row.images[3])
    assert frame_subset(row, [1, 2, 3, 4]).messages == row.messages
    bare = Record("b", "trajectory", row.images, question("trajectory", "dog", images=4), {})
    assert [p["type"] for p in frame_subset(bare, [3]).messages[0]["content"]] == ["image", "text"]
    with pytest.raises(ValueError, match=r"images 1 to 4, got \[5\]"):
        frame_subset(row, [5])


def test_grey_frames_keep_the_prompt_and_hide_the_rest(policy: Policy) -> None:
    row = clip("a", 4)
    kept = greyed(row, [2, 4])
    assert kept.messages == row.messages
    assert (kept.images[1], kept.images[3]) == (row.images[1], row.images[3])
    assert {kept.images[i].getpixel((3, 3)) for i in (0, 2)} == {(127, 127, 127)}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"images 1 to 4, got \[5\]"):
        greyed(row, [5])
    (found,) = temporal_perplexity(policy, [row], absent="grey", samples=2, curve=True)
    alone = [temporal_perplexity(policy, [greyed(row, [t])], samples=1)[0].full for t in (1, 2, 3, 4)]
    assert list(found.curve.values()) == pytest.approx(alone, abs=1e-5)
    (other,) = temporal_perplexity(policy, [row], samples=2, curve=True)
    assert found.full == pytest.approx(other.full, abs=1e-6)
    assert list(other.curve.values()) != pytest.approx(alone, abs=1e-5)
    with pytest.raises(ValueError, match="--absent"):
        temporal_perplexity(policy, [row], absent="black")


# ---- the run


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("utr") / "dialogues.jsonl"
    build_dialogues(BuildOptions("scenes:trajectory?n=4&size=56&difficulty=2", frames=3), out)
    return out


def test_the_filter_keeps_the_rows_that_need_the_clip(
    dialogues: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in dialogues.read_text().splitlines()]
    out = tmp_path / "elsewhere" / "kept.jsonl"
    options = TplOptions(str(tiny_folder("qwen2_5")), str(dialogues), samples=2, keep_top=0.5)
    result = run_tpl(options, out=out, draw=draw_tpl)
    values = {value["id"]: value["tpl"] for value in result["values"]}
    assert result["n"] == len(rows) == len(values)
    assert result["mean_tpl"] == pytest.approx(sum(values.values()) / len(rows))
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    best = sorted(values.values(), reverse=True)[: math.ceil(len(rows) / 2)]
    assert sorted((row["tpl"] for row in kept), reverse=True) == pytest.approx(best)
    assert [row["id"] for row in kept] == [row["id"] for row in rows if values[row["id"]] >= result["threshold"]]
    original = {row["id"]: row for row in rows}
    for row in kept:
        assert {k: v for k, v in row.items() if k not in ("tpl", "frames")} == {
            k: v for k, v in original[row["id"]].items() if k != "frames"
        }
    again = load_data(f"utr:{out}")  # the pictures are found from the new folder, too
    assert [r.target["tpl"] for r in again] == pytest.approx([row["tpl"] for row in kept])
    assert Path(result["plot"]) == out.with_suffix(".png")
    with Image.open(result["plot"]) as figure:
        assert figure.format == "PNG"
    assert json.loads(json.dumps(result))["values"][0]["curve"]
    assert result["absent"] == "left out"
    grey = run_tpl(replace(options, keep_top=None, limit=2, absent="grey"), plot=out.with_suffix(".png"))
    first = {value["id"]: value for value in result["values"]}
    assert all(value["full"] == pytest.approx(first[value["id"]]["full"], abs=1e-4) for value in grey["values"])
    assert any(value["tpl"] != pytest.approx(first[value["id"]]["tpl"], abs=1e-4) for value in grey["values"])


@pytest.mark.parametrize(
    ("data", "keep", "out", "message"),
    [
        ("{file}", 0.5, None, "--keep-top needs --out"),
        ("{file}", 0.0, "o.jsonl", r"--keep-top: expected a fraction in \(0, 1\], or a percentage"),
        ("{file}", 0.5, "{file}", "is the data itself"),
        ("scenes:utr?n=2&size=56&frames=2", 0.5, "o.jsonl", "scenes:utr is not a file of rows"),
    ],
)
def test_what_cannot_be_kept_is_said_before_any_work(
    dialogues: Path, tmp_path: Path, data: str, keep: float, out: str | None, message: str
) -> None:
    target = None if out is None else tmp_path / out.format(file=dialogues)
    with pytest.raises(ValueError, match=message):
        run_tpl(TplOptions("no such model", data.format(file=dialogues), keep_top=keep), out=target)


def test_any_records_can_be_measured(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    result = run_tpl(
        TplOptions(str(tiny_folder("qwen2_5")), "scenes:shown?n=2&size=56&frames=2", single="best"),
        plot=tmp_path / "p.png",
        draw=draw_tpl,
    )
    assert result["n"] == 2
    assert result["out"] is None
    assert (tmp_path / "p.png").is_file()


def made(tpl: float, curve: dict[int, float] | None = None, frames: int = 4) -> TemporalPerplexity:
    return TemporalPerplexity("x", tpl, -1.0, -1.0 - tpl, (1,), curve or {1: -1.0 - tpl}, frames, 5)


@pytest.mark.parametrize(
    ("share", "kept"), [(1.0, [0, 1, 2, 3]), (0.5, [1, 3]), (0.3, [1, 3]), (0.25, [3]), (0.01, [3])]
)
def test_keep_top_rounds_up_and_keeps_the_order(share: float, kept: list[int]) -> None:
    assert keep_top([made(t) for t in (0.1, 0.5, 0.2, 0.9)], share) == kept
    assert keep_top([made(0.5), made(0.5)], 0.5) == [0]


def test_percentages_above_one_are_percentages() -> None:
    assert TplOptions("m", "d", keep_top=30).fraction == pytest.approx(0.3)
    assert TplOptions("m", "d", keep_top=1).fraction == 1.0


def test_the_curve_is_laid_over_the_clip_s_length() -> None:
    long, short = made(0.5, {1: -1.0, 5: -3.0}, frames=5), made(0.5, {1: -2.0}, frames=1)
    assert mean_curve([long, short]) == ([0.0, 1.0], [-0.5, -2.0])
    assert long.explaining() == [1]
    assert long.explaining(tolerance=5) == [1, 5]
