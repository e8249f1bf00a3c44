"""``patch(model)``: the loss and all gradients of the unpatched model; everything else is unchanged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels.integrations import _head

transformers = pytest.importorskip("transformers")
patch = pytest.importorskip("fastrl_kernels.integrations.transformers").patch

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61}
SIZES |= {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> Any:
    sizes = {"vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


def qwen_vl() -> Any:
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 16}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = SIZES | {"rope_parameters": rope}
    tokens = {"image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def text_model(kind: str, **options: Any) -> Any:
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES, **options))


MODELS = {
    "gpt2, positional arguments": gpt2,
    "qwen2.5-vl": qwen_vl,
    "gemma2, softcap": lambda: text_model("Gemma2", head_dim=8, final_logit_softcapping=2.0),
    "granite, divided": lambda: text_model("Granite", logits_scaling=3.0),
    "cohere, multiplied": lambda: text_model("Cohere", logit_scale=0.25),
    "phi, with a bias": lambda: text_model("Phi"),
}


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 50, (3, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    labels[1] = -100
    return ids, labels


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = MODELS[name]().train()
    for weight in plain.parameters():  # far from the all-equal logits of a fresh model
        torch.nn.init.normal_(weight, std=0.4)
    return plain, patch(copy.deepcopy(plain), **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["mean", "num_items", "shift_labels"])
def test_loss_and_gradients_are_the_models_own(name: str, kind: str) -> None:
    plain, patched = pair(name)
    ids, labels = batch()
    call: dict[str, Any] = {"labels": labels, "attention_mask": torch.ones_like(ids)}
    if kind == "num_items":
        call["num_items_in_batch"] = torch.tensor(40)
    elif kind == "shift_labels":
        call |= {"shift_labels": torch.where(labels < 0, 3, labels)}
    theirs, ours = plain(ids, **call), patched(ids, **call)
    assert theirs.logits is not None
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    theirs.loss.backward()
    ours.loss.backward()
    for (key, weight), mine in zip(plain.named_parameters(), patched.parameters(), strict=True):
        if weight.grad is None:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad, weight.grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_no_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, patched = pair("gpt2, positional arguments")
    monkeypatch.setattr(patched.lm_head, "forward", lambda *_: pytest.fail("the head was called"))
    ids, labels = batch()
    assert patched(ids, labels=labels).loss.isfinite()


@pytest.mark.parametrize("name", ["qwen2.5-vl", "gemma2, softcap"])
def test_all_else_is_the_model_it_was(name: str) -> None:
    plain, patched = pair(name)
    ids, labels = batch()
    for call in ({}, {"labels": labels, "logits_to_keep": 9}, {"labels": labels, "return_dict": False}):
        theirs, ours = plain(ids, **call), patched(ids, **call)
        torch.testing.assert_close(ours[0], theirs[0])
    plain.eval()
    patched.eval()
    torch.testing.assert_close(patched(ids, labels=labels).logits, plain(ids, labels=labels).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(patched.generate(ids, **options), plain.generate(ids, **options))


def test_no_label_is_nan_as_theirs_is() -> None:
    plain, patched = pair("gpt2, positional arguments")
    ids = torch.randint(3, 50, (1, 4))
    labels = torch.full_like(ids, -100)
    assert plain(ids, labels=labels).loss.isnan()
    assert patched(ids, labels=labels).loss.isnan()


def test_trainer_trains_the_same(tmp_path: Any) -> None:
    def train(model: Any) -> Any:
        rng = torch.Generator().manual_seed(5)
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 50, (8, 6), generator=rng)]
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "optim": "sgd"}
        options |= {"learning_rate": 0.1, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **options)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        return trainer

    plain, patched = pair("qwen2.5-vl")
    start = patched.lm_head.weight.detach().clone()
    train(plain)
    train(patched)
    for mine, weight in zip(patched.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, weight, rtol=1e-5, atol=1e-6)
    assert (patched.lm_head.weight - start).abs().max() > 1e-3


def test_what_has_no_fused_head_is_refused() -> None:
    sizes = {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 61, "d_kv": 8}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration: is an encoder-decoder"):
        patch(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    with pytest.raises(ValueError, match="not a plain linear layer"):
        patch(gpt2().transformer)

    class Odd(transformers.GPT2LMHeadModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.loss = output.loss * 1.01
            return output

    odd = Odd(gpt2().config)
    with pytest.raises(ValueError, match="the model transforms its logits in a way that its config does not describe"):
        patch(odd)
    assert "forward" not in vars(odd) or odd.forward.__func__ is Odd.forward
    patch(odd, verify=False)


def test_a_negative_factor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cohere: .* positive factor on the logits, got -1\.0"):
        _head.Logits.of(transformers.CohereConfig(logit_scale=-1.0))
