"""Loading: both families through one path, clear errors, LoRA, freezing, the reference, saving."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastrl.batch import Completion, PromptGroup, pack_row
from fastrl.data.records import Record
from fastrl.models import Policy, load_policy

Folder = Callable[[str], Path]
STYLES = ("qwen2_5", "qwen2")


def batch_of(policy: Policy):
    content = [{"type": "image"}, {"type": "text", "text": "Where?"}]
    image = Image.linear_gradient("L").resize((70, 90))
    prompt, _ = policy.encode(Record("r", "grounding", (image,), ({"role": "user", "content": content},), {}))
    return pack_row(
        [PromptGroup(prompt, [Completion(policy.encode_text("[1, 2]")), Completion(policy.encode_text("no"))])]
    )


@pytest.mark.parametrize(("style", "frame"), [("qwen2_5", "resized"), ("qwen2", "thousand")])
def test_both_families_load_through_one_path(style: str, frame: str, tiny_folder: Folder) -> None:
    policy = load_policy(tiny_folder(style), device="cpu")
    assert (policy.style, policy.frame, policy.dtype) == (style, frame, torch.float32)
    assert policy.model is policy.core


def test_end_and_suppressed_tokens(tiny_folder: Folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu")
    text = policy.tokenizer.convert_ids_to_tokens
    assert text(list(policy.eos_token_ids)) == ["<|im_end|>", "<|endoftext|>"]
    assert set(text(list(policy.suppressed_token_ids))) == {
        *("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    }, "boxes and references may be answered"


def test_a_missing_folder_a_plain_folder_and_another_model_are_told_apart(tmp_path: Path, tiny_folder: Folder) -> None:
    with pytest.raises(FileNotFoundError, match="not found"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"'llama' is not supported; supported: .*qwen2_5_vl, qwen2_vl"):
        load_policy(tmp_path)


def test_a_template_without_images_is_refused_unless_the_processor_has_one(tmp_path: Path, tiny_folder: Folder) -> None:
    folder = shutil.copytree(tiny_folder("qwen2"), tmp_path / "copy")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="no chat template that places images"):
        load_policy(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_policy(folder, device="cpu").tokenizer.chat_template == template


def test_files_that_cannot_be_read_are_named(tiny_folder: Folder, tmp_path: Path) -> None:
    """Whatever a library raises for a broken file, the message names the folder and the problem."""

    def broken(name: str, text: str | None) -> Path:
        folder = tmp_path / f"{name}-{text is None}-{len(text or '')}"
        shutil.copytree(tiny_folder("qwen2_5"), folder)
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_text(text)
        return folder

    for name, text, what in (
        ("config.json", "{bad", "config.json"),
        ("config.json", "[1]", "config.json"),
        ("tokenizer.json", None, "tokenizer"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("model.safetensors", None, "weights"),
        ("model.safetensors", "x", "weights"),
    ):
        folder = broken(name, text)
        with pytest.raises(ValueError, match=re.escape(f"{folder}: its {what} cannot be read (")):
            load_policy(folder, device="cpu")


def _edited(folder: Path, to: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    edit(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("model.layers.0.mlp.down_proj.weight", "model.language_model.layers.0.mlp.down_proj.weight"),
        ("visual.merger.mlp.0.bias", "model.visual.merger.mlp.0.bias"),
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_weights_the_files_lack_are_refused_by_name(tiny_folder: Folder, tmp_path: Path, name: str, shown: str) -> None:
    """They would be initialised at random and trained."""
    folder = _edited(tiny_folder("qwen2"), tmp_path / "lacks", lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=re.escape(f"{folder}: its weights lack 1 of the model's: {shown}")):
        load_policy(folder, device="cpu")
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = {name: torch.ones(3, 5)}
    folder = _edited(tiny_folder("qwen2"), tmp_path / "shape", lambda weights: weights.update(wrong))
    with pytest.raises(ValueError, match=r"config.json says: .*up_proj.weight \(file \[3, 5\], config \[96, 64\]\)"):
        load_policy(folder, device="cpu")


def test_weights_without_a_place_are_listed(
    tiny_folder: Folder, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    extra = {f"extra.{i}": torch.ones(1) for i in range(7)}
    folder = _edited(tiny_folder("qwen2_5"), tmp_path / "more", lambda weights: weights.update(extra))
    load_policy(folder, device="cpu")
    (printed,) = [str(w.message) for w in recwarn if "no place" in str(w.message)]
    assert f"{folder}: 7 of its weights have no place in the model, left out: extra.0" in printed
    assert printed.endswith("extra.4 and 2 more")


@pytest.mark.parametrize(
    ("device", "printed"), [("banana", "expected a device such as"), ("cuda:99", "does not exist")]
)
def test_devices_that_are_not_there_are_named(tiny_folder: Folder, device: str, printed: str) -> None:
    with pytest.raises(ValueError, match=rf"model.device: .*{printed}"):
        load_policy(tiny_folder("qwen2_5"), device=device)


@pytest.mark.parametrize(
    ("targets", "printed"),
    [("([", "is not a regular expression"), ("nothing_here", "matches no linear layer; there are .*q_proj"), ([], "")],
)
def test_adapters_on_no_layer_are_an_error(tiny_folder: Folder, targets: Any, printed: str) -> None:
    with pytest.raises(ValueError, match=f"lora.targets: .*{printed}"):
        load_policy(tiny_folder("qwen2_5"), device="cpu", lora={"targets": targets})


def test_pixel_limits_bound_the_resized_image_and_are_saved(tiny_folder: Folder, tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 200))
    for limit in (56 * 56, 140 * 140):
        policy = load_policy(tiny_folder("qwen2"), device="cpu", min_pixels=28 * 28, max_pixels=limit)
        (_, h, w) = policy.preprocessor(image)[0].shape
        assert limit / 4 < h * w * 14 * 14 <= limit
        policy.save(tmp_path / str(limit))  # the limits go with the model
        assert load_policy(tmp_path / str(limit), device="cpu").preprocessor(image)[0].shape == (1, h, w)
    with pytest.raises(ValueError, match="min_pixels"):
        load_policy(tiny_folder("qwen2"), min_pixels=200, max_pixels=100)


@pytest.mark.parametrize("style", STYLES)
def test_lora_trains_only_its_adapters_and_the_reference_is_the_model_without_them(
    style: str, tiny_folder: Folder
) -> None:
    base = load_policy(tiny_folder(style), device="cpu")
    policy = load_policy(tiny_folder(style), device="cpu", lora={"rank": 4, "alpha": 8})
    trained = {name for name, p in policy.core.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name and "language_model" in name for name in trained)
    batch = batch_of(policy)
    with torch.no_grad():
        want = base.logprob(batch).logp
        for name, parameter in policy.core.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        live = policy.logprob(batch).logp
    assert (live - want).abs().max() > 0.01
    with policy.reference() as reference:
        assert torch.equal(reference.logprob(batch).logp, want)
    assert {name for name, p in policy.core.named_parameters() if p.requires_grad} == trained
    loss = policy.logprob(batch).logp.sum()
    torch.testing.assert_close(loss.detach(), live.sum())
    loss.backward()
    assert {name for name, p in policy.core.named_parameters() if p.grad is not None} == trained
    with pytest.raises(RuntimeError, match="under LoRA"):
        policy.make_reference()


@pytest.mark.parametrize("lora", [None, {"rank": 2, "dropout": 0.5}])
@pytest.mark.parametrize("style", STYLES)
def test_a_saved_folder_is_an_ordinary_one_and_answers_the_same(
    style: str, lora: dict | None, tmp_path: Path, tiny_folder: Folder
) -> None:
    from transformers import AutoModelForImageTextToText

    policy = load_policy(tiny_folder(style), device="cpu", lora=lora)
    batch = batch_of(policy)
    with torch.no_grad():
        for parameter in policy.core.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        want = policy.logprob(batch).logp
        policy.save(tmp_path / "saved")
        saved = load_policy(tmp_path / "saved", device="cpu")
        torch.testing.assert_close(saved.logprob(batch).logp, want, rtol=1e-4, atol=1e-5)
        assert torch.equal(policy.logprob(batch).logp, want), "saving leaves the policy as it was"
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in saved.core.named_parameters()}
    assert plain.config._attn_implementation == "sdpa"


def test_layers_without_a_shared_form_are_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("qwen2_5"), tmp_path / "windows"))
    config = json.loads((folder / "config.json").read_text())
    for changes in (
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["linear_attention"] * 2},
    ):
        config["text_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"windows: .*{changes['layer_types'][1]}.*supported: full_attention"):
            load_policy(folder, device="cpu")


def test_unknown_lora_fields_and_freeze_patterns_are_errors(tiny_folder: Folder) -> None:
    allowed = "'alpha', 'also_train', 'dora', 'dropout', 'rank', 'rslora', 'targets'"
    with pytest.raises(ValueError, match=f"unknown fields \\['r'\\]; allowed: \\[{allowed}\\]"):
        load_policy(tiny_folder("qwen2"), device="cpu", lora={"r": 4})
    with pytest.raises(ValueError, match="'visul' matches no parameter; near: visual"):
        load_policy(tiny_folder("qwen2"), device="cpu", freeze=["visul"])


@pytest.mark.parametrize("patterns", [["visual"], ["*visual*"], ["model.visual.*"], ["vision", "projector"]])
def test_a_frozen_vision_tower_takes_no_gradient_and_keeps_no_graph(patterns: list[str], tiny_folder: Folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu", freeze=patterns)
    features = policy.features(batch_of(policy).images)
    assert not any(f.tokens.requires_grad for f in features.values())
    policy.logprob(batch_of(policy)).logp.sum().backward()
    for name, parameter in policy.core.named_parameters():
        assert (parameter.grad is None) == ("visual" in name), name


def test_the_frozen_copy_stays_while_the_policy_moves(tiny_folder: Folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu")
    batch = batch_of(policy)
    with pytest.raises(RuntimeError, match="make_reference"), policy.reference():
        pass
    with torch.no_grad():
        want = policy.logprob(batch).logp
    policy.make_reference()
    with torch.no_grad():
        for parameter in policy.core.parameters():
            parameter.mul_(1.1)
    with policy.reference() as reference:
        got = reference.logprob(batch).logp
    assert torch.equal(got, want)
    assert not got.requires_grad
    assert not torch.equal(policy.logprob(batch).logp, want)


def test_the_frozen_copy_shares_what_is_not_trained(tiny_folder: Folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu", freeze=["visual"])
    policy.make_reference()
    live = dict(policy.core.named_parameters())
    with policy.reference():
        kept = dict(policy.core.named_parameters())
    assert {name for name, p in live.items() if kept[name] is p} == {n for n, p in live.items() if not p.requires_grad}
    assert not any(p.requires_grad for p in kept.values())
    assert any(p.requires_grad for p in live.values())


def test_transformers_generate_still_works_and_keeps_its_own_attention(tiny_folder: Folder) -> None:
    """Calls without segments are unchanged: greedy tokens equal those of the model loaded by transformers."""
    from transformers import AutoModelForImageTextToText

    policy = load_policy(tiny_folder("qwen2_5"), device="cpu")
    plain = AutoModelForImageTextToText.from_pretrained(tiny_folder("qwen2_5"))
    prompt = batch_of(policy)
    ids = prompt.input_ids[:, : prompt.segments.spans[0].prompt]
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == policy.core.config.image_token_id).int(),
        "pixel_values": prompt.images[0].pixel_values,
        "image_grid_thw": torch.tensor([prompt.images[0].shape]),
    }
    got, want = (m.generate(**inputs, max_new_tokens=8, do_sample=False) for m in (policy.core.eval(), plain.eval()))
    assert torch.equal(got, want)


@pytest.mark.parametrize("style", STYLES)
def test_patches_are_embedded_by_a_product_that_equals_the_convolution(style: str, tiny_folder: Folder) -> None:
    policy = load_policy(tiny_folder(style), device="cpu")
    policy.make_reference()
    patches = torch.randn(12, 1176)
    for core in (policy.core, policy._reference_core):
        embed = core.model.visual.patch_embed
        torch.testing.assert_close(embed(patches), type(embed).forward(embed, patches), rtol=1e-5, atol=1e-5)
        embed.proj.weight.data.mul_(2)  # a copy follows its own weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Conv3d, "forward", lambda *_: pytest.fail("convolution"))
        policy.features(batch_of(policy).images)
