"""``SharedPrefixGRPOMixin`` on a real ``GRPOTrainer`` with picture prompts: losses, metrics and weights of plain
TRL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

import fastrl.toy  # noqa: E402
from benchmarks.versus.model import load_processor  # noqa: E402  (it needs transformers)
from fastrl.integrations import trl as shared  # noqa: E402
from fastrl.models.families import Family, families, family_of  # noqa: E402
from fastrl.models.load import load_tokenizer  # noqa: E402
from tests.helpers.families import build_family  # noqa: E402

TOLERANCE = 1e-5
STEPS = 5
MEANS = ("entropy", "kl")  # logged as means over micro-batches, so they depend on how answers are distributed
EXTREMES = ("clip_ratio/low_min", "clip_ratio/high_max")  # over micro-batches of few answers
CLOCKS = ("time", "runtime", "per_second", "flos")


LLAVA = Path(fastrl.toy.__file__).parent / "weights" / "llava"  # a shipped model


class Shared(shared.SharedPrefixGRPOMixin, trl.GRPOTrainer):
    """The code that the docs recommend."""


def load_llava_processor(folder: Path) -> Any:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer, config = load_tokenizer(folder), transformers.AutoConfig.from_pretrained(folder)
    tokenizer.padding_side = "left"
    return transformers.LlavaProcessor(
        LlavaImageProcessorPil.from_pretrained(folder),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    )


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def dataset(pictures: bool) -> Any:
    from datasets import Dataset, Image
    from PIL import Image as pil

    rng = torch.Generator().manual_seed(2)
    rows = []
    for n, (width, height) in enumerate([(80, 60), (60, 112), (112, 112), (56, 84), (90, 90), (64, 64)] * 2):
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": f"picture {n % 6}" + "?" * (n % 3)}]}
        if pictures:
            noise = torch.randint(256, (height, width, 3), generator=rng, dtype=torch.uint8)
            row["images"] = [pil.fromarray(noise.numpy())] * (1 + (n % 3 == 2))
        rows.append(row)
    data = Dataset.from_list(rows)
    return data.cast_column("images", [Image()]) if pictures else data


def run(kind: type, folder: Path, out: Path, *, pictures: bool = True, lora: bool = False, **options: Any) -> Any:
    processor = load_llava_processor(folder) if folder == LLAVA else load_processor(folder)
    suppressed = [n for n in range(256, len(processor.tokenizer)) if n != processor.tokenizer.eos_token_id]
    arguments = trl.GRPOConfig(
        **{
            "output_dir": str(out),
            "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": 6,
            "generation_kwargs": {"suppress_tokens": suppressed},
            "max_steps": STEPS,
            "logging_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "shuffle_dataset": False,
            "disable_dropout": True,
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        | options
    )
    adapter = {}
    if lora:
        peft = pytest.importorskip("peft")
        adapter = {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
        torch.manual_seed(1)
    trainer = kind(
        model=str(folder),
        reward_funcs=reward,
        args=arguments,
        train_dataset=dataset(pictures),
        processing_class=processor,
        **adapter,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


CASES: dict[str, dict[str, Any]] = {
    "pictures": {"loss_type": "grpo"},
    "pictures, off-policy, KL": {"num_iterations": 2, "beta": 0.2, "epsilon": 0.02},
    "pictures, bnpo, LoRA": {"loss_type": "bnpo", "lora": True, "beta": 0.1},
    "text": {"pictures": False, "steps_per_generation": 4},
    "pictures, checkpointing off": {"gradient_checkpointing": False, "loss_type": "dr_grpo"},
}
QUICK = ("pictures",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.gate) for n in CASES])
@pytest.mark.parametrize(
    "style", ["qwen2_5", *(pytest.param(s, marks=pytest.mark.gate) for s in ("qwen2", "llava", "qwen3_5"))]
)
def test_a_run_is_plain_trls(
    name: str, style: str, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if style == "qwen3_5":
        folder = build_family(tmp_path / "model", style)
    else:
        folder = LLAVA if style == "llava" else tiny_folder(style)
    options = CASES[name]
    tolerance = TOLERANCE if style.startswith("qwen2") else 1e-4  # the others' gradients are ten times as large
    theirs = run(trl.GRPOTrainer, folder, tmp_path, **options)
    seen: list[tuple[int, int]] = []  # (prompts, answers) of each packed forward
    packed = shared.packed_states

    def counted(core: Any, batch: Any, **named: Any) -> Any:
        seen.append((batch.n_groups, len(batch.completions)))
        return packed(core, batch, **named)

    monkeypatch.setattr(shared, "packed_states", counted)
    ours = run(Shared, folder, tmp_path, **options)
    assert len(seen) >= 2 * STEPS
    assert all(answers == 4 for _, answers in seen)
    prompts = [count for count, _ in seen]
    if options.get("loss_type") == "bnpo":  # whose micro-batches keep TRL's random order
        assert max(prompts) == 2
    elif "steps_per_generation" in options:  # an optimizer step has only some answers of each prompt
        assert min(prompts) < 4
    else:
        assert set(prompts) == {1}
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            if not any(word in key for word in CLOCKS):
                near = 0.1 if key in MEANS or key.startswith("clip_ratio/") else tolerance
                near = 1.0 if key in EXTREMES else near
                assert mine[key] == pytest.approx(value, rel=near, abs=near, nan_ok=True), key
    for (key, mine), (_, other) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, msg=key)
    assert sum(row.get("grad_norm", 0.0) for row in theirs.state.log_history) > 0.1


def test_another_family_is_refused(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **sizes))
    tokenizer = load_processor(tiny_folder("qwen2_5")).tokenizer
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    with pytest.raises(ValueError, match=r"model type 'llama' is not supported; supported: .*qwen2_5_vl"):
        Shared(
            model=model,
            reward_funcs=reward,
            args=trl.GRPOConfig(**options),
            train_dataset=dataset(False),
            processing_class=tokenizer,
        )


def rows(family: Any, *, moved: bool = False) -> dict[str, Any]:
    """Three padded rows, two with the same prompt and picture; ``moved``: the second's picture differs in one value."""
    grid, tokens = (1, 4, 4), 4
    picture = family.image_token
    prompt = torch.tensor([9, *[picture] * tokens, 8])
    ids = torch.zeros(3, 9, dtype=torch.int64)
    mask = torch.zeros(3, 9, dtype=torch.int64)
    for row, (end, answer) in enumerate(((6, 3), (6, 1), (6, 0))):
        ids[row, :end], mask[row, :end] = prompt, 1
        ids[row, 6 : 6 + answer], mask[row, 6 : 6 + answer] = torch.arange(20, 20 + answer), 1
    ids[2, 0] = 7
    pixels = torch.randn(16, 10).repeat(3, 1)
    if moved:
        pixels[17, 0] += 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "answer": 3,
        "pictures": {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid] * 3), "num_images": [1, 1, 1]},
        "family": family,
    }


def test_the_families_that_the_docs_name_share_pictures() -> None:
    sharing = {f.__name__ for f in families().values() if f.processed is not Family.processed}
    qwen = {"Qwen2VL", "Qwen2_5VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe"}
    assert sharing == qwen | {"Glm4V", "Glm4VMoe", "Glm46V", "Llava"}


def test_squares_of_llava_are_told_apart() -> None:
    family, pixels = family_of(transformers.AutoConfig.from_pretrained(LLAVA)), torch.randn(3, 3, 28, 28)
    found = family.processed({"pixel_values": pixels})
    assert [image.key for image in found] == ["0", "1", "2"]
    assert all(torch.equal(image.pixel_values[0], one) for image, one in zip(found, pixels, strict=True))
    assert {image.shape for image in found} == {(28, 28)}
    assert family.processed({"pixel_values": pixels[:, None]}) is None  # tiles, of another family
    assert family.processed({}) is None


@pytest.fixture
def family(tiny_folder: Callable[[str], Path]) -> Any:
    return family_of(transformers.AutoConfig.from_pretrained(tiny_folder("qwen2_5")))


@pytest.mark.parametrize(("moved", "groups"), [(False, [2, 1]), (True, [1, 1, 1])])
def test_rows_share_a_prompt_only_with_the_same_pictures(family: Any, moved: bool, groups: list[int]) -> None:
    found = shared.Rows.of(**rows(family, moved=moved))
    assert found is not None
    batch, places = found.pack(range(3))
    assert [len(span.completions) for span in batch.segments.spans] == groups
    assert places.tolist() == [0, 1, 2, 3]  # three tokens of row 0, one of row 1, none of row 2
    assert batch.targets.tolist() == [20, 21, 22, 20]


def test_what_cannot_be_shared_is_left_to_trl(family: Any) -> None:
    given = rows(family)
    given["pictures"]["pixel_attention_mask"] = torch.ones(1)
    assert shared.Rows.of(**given) is None
    holed = rows(family)
    holed["attention_mask"][0, 6] = 0
    assert shared.Rows.of(**holed) is None


def test_picture_tokens_that_are_not_there_are_an_error(family: Any) -> None:
    given = rows(family)
    given["input_ids"][:, 2] = 5
    found = shared.Rows.of(**given)
    assert found is not None
    with pytest.raises(ValueError, match=r"no run of tokens for a picture of shape \(1, 4, 4\)"):
        found.pack(range(3))


def test_sorting_keeps_every_row_whole() -> None:
    batches = []
    for n in range(3):
        prompts = torch.tensor([[n % 2, 5], [(n + 1) % 2, 5]])
        batch: dict[str, Any] = {"prompt_ids": prompts, "advantages": prompts[:, 0] + 10.0, "num_images": [1, 2]}
        batch |= {"image_grid_thw": torch.tensor([[1, 1, 1 + n]] * 3), "total": torch.tensor(4)}
        batch["pixel_values"] = torch.arange(3 * (1 + n))[:, None] + 100 * n
        batches.append(batch)
    made = shared.sort_by_prompt(batches)
    prompts = torch.cat([batch["prompt_ids"][:, 0] for batch in made])
    assert prompts.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.cat([batch["advantages"] for batch in made]).tolist() == [10.0] * 3 + [11.0] * 3
    assert [batch["num_images"] for batch in made] == [[1, 2], [1, 2], [1, 2]]
    shown = [made[n]["pixel_values"][:, 0].tolist() for n in range(3)]
    assert shown == [[0, 102, 103, 104, 105], [200, 201, 202, 1, 2], [100, 101, 203, 204, 205, 206, 207, 208]]
    assert all(batch["total"] == 4 for batch in made)
