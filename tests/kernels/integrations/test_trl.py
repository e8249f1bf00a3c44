"""``FusedGRPOMixin`` on a real ``GRPOTrainer``: the losses, metrics and weights of plain TRL, for every option."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl_kernels.integrations import _head

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
mixin = pytest.importorskip("fastrl_kernels.integrations.trl")

TOLERANCE = 1e-5
STEPS = 5


class Fused(mixin.FusedGRPOMixin, trl.GRPOTrainer):
    """The code that the docs recommend."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz 0123456789"]
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny Gemma 2, the family whose head has a softcap, on disk: TRL loads its reference from there."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    made = tmp_path_factory.mktemp("gemma")
    config = transformers.Gemma2Config(**sizes, **ends, final_logit_softcapping=3.0, initializer_range=0.3)
    transformers.Gemma2ForCausalLM(config).save_pretrained(made)
    return made


def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs within a group, but is equal for all answers to a prompt that requests nothing."""
    return [sum(ids) % 7 / 7 if len(p) > 1 else 0.5 for p, ids in zip(prompts, completion_ids, strict=True)]


def run(trainer: type, folder: Path, tokenizer: Any, *, lora: bool = False, **options: Any) -> Any:
    """A finished run of STEPS steps on made-up prompts of unequal length."""
    from datasets import Dataset

    arguments = trl.GRPOConfig(
        **{
            "output_dir": str(folder / "out"),
            "model_init_kwargs": {"attn_implementation": "eager", "dtype": "float32"},
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": 9,
            "max_steps": STEPS,
            "logging_steps": 1,
            "optim": "sgd",  # its steps are as exact as the gradients; AdamW divides noise by noise
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "temperature": 0.9,
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
    prompts = ["say a", "read the number", "b", "count to 7 please", "what", "a longer prompt than the rest"]
    adapter = {}
    if lora:
        peft = pytest.importorskip("peft")
        adapter = {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
        torch.manual_seed(1)  # of the adapter's weights
    built = trainer(
        model=str(folder),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts * 8]),
        processing_class=tokenizer,
        **adapter,
    )
    built.remove_callback(transformers.PrinterCallback)
    built.train()
    return built


CLOCKS = ("time", "runtime", "per_second", "flos")


def assert_same_run(ours: Any, theirs: Any, folder: Path) -> None:
    """Every logged number and every weight agree, and the run did train."""
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if not any(word in name for word in CLOCKS):
                assert mine[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), name
    start = dict(transformers.Gemma2ForCausalLM.from_pretrained(folder).named_parameters())
    moved = 0.0
    lora = [name for name, _ in theirs.model.named_parameters() if ".lora_B." in name]
    for (name, mine), (_, other) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
        if name in start:
            moved = max(moved, float((other - start[name]).detach().abs().max()))
    assert moved > 300 * TOLERANCE or lora


OPTIONS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo with KL": {"loss_type": "grpo", "beta": 0.3},
    "grpo with plain KL": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False, "num_iterations": 2},
    "bnpo off-policy": {"loss_type": "bnpo", "num_iterations": 2, "epsilon": 0.02, "epsilon_high": 0.03},
    "dr_grpo, two-sided": {"loss_type": "dr_grpo", "num_iterations": 3, "epsilon": 0.01, "delta": 1.02, "beta": 0.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2, "epsilon": 3e-3},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "num_iterations": 2, "epsilon": 3e-3},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.01, "num_iterations": 2},
    "sapo": {"loss_type": "sapo", "num_iterations": 2},
    "LoRA": {"beta": 0.2, "num_iterations": 2},
}
QUICK = ("grpo with plain KL", "gspo")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.gate) for n in OPTIONS])
def test_a_run_is_plain_trls(name: str, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = OPTIONS[name]
    theirs = run(trl.GRPOTrainer, folder, tokenizer, lora=name == "LoRA", **options)
    calls = {"head": 0, "loss": 0}

    def counted(key: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[key] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(_head, "linear_logprob", counted("head", _head.linear_logprob))
    monkeypatch.setattr(mixin, "policy_loss", counted("loss", mixin.policy_loss))
    ours = run(Fused, folder, tokenizer, lora=name == "LoRA", **options)
    assert calls["head"] >= 2 * STEPS
    assert calls["loss"] >= 2 * STEPS
    assert_same_run(ours, theirs, folder)


@pytest.fixture(scope="module")
def trained(folder: Path, tokenizer: Any) -> Any:
    return run(Fused, folder, tokenizer, max_steps=1, beta=0.5)


def batch(trainer: Any) -> dict[str, Any]:
    """The arguments of a trainer's loss: ragged, one answer fully masked, log-probs of a changed policy."""
    rng = torch.Generator().manual_seed(3)
    rows, prompt, answer = 5, 6, 7
    ids = torch.randint(2, 39, (rows, prompt + answer), generator=rng)
    lengths = torch.tensor([7, 4, 0, 1, 6])
    mask = (torch.arange(answer) < lengths[:, None]).long()
    inputs: dict[str, Any] = {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": (torch.arange(prompt) >= torch.tensor([0, 2, 1, 5, 0])[:, None]).long(),
        "completion_ids": ids[:, prompt:],
        "completion_mask": mask,
        "tool_mask": (torch.rand(rows, answer, generator=rng) > 0.2).long(),
        "advantages": torch.tensor([1.0, -0.7, 0.3, 0.0, -1.2]),
        "num_items_in_batch": torch.tensor(31),
    }
    with torch.no_grad():
        logp = trainer._completion_logps(trainer.model, inputs)[0]
    for name, spread in (("old", 0.3), ("ref", 0.5)):
        inputs[f"{name}_per_token_logps"] = logp + spread * torch.randn(logp.shape, generator=rng)
    inputs["sampling_per_token_logps"] = logp + 0.4 * torch.randn(logp.shape, generator=rng)
    inputs["importance_sampling_ratio"] = 0.5 + torch.rand(logp.shape, generator=rng)
    return inputs


SAMPLER = {"use_vllm": True, "vllm_importance_sampling_correction": True}
LEVELS = ("token", "sequence")
CASES: list[dict[str, Any]] = [
    {"loss_type": kind, "importance_sampling_level": level, "beta": 0.5, "args.delta": 1.3}
    for kind, level in itertools.product(mixin.CLIPPED, LEVELS)
]
CASES += [
    {"loss_type": kind, "importance_sampling_level": level, "beta": 0.5, "epsilon_high": 1.2}
    for kind, level in itertools.product(("cispo", "sapo"), LEVELS)
]
CASES += [{"loss_type": "dapo", "beta": 0.0}, {"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.0}]
CASES += [
    {"loss_type": kind, "beta": beta, **change, "args.use_bias_correction_kl": corrected}
    for kind, beta, corrected in (("grpo", 0.5, False), ("dapo", 0.0, True), ("bnpo", 0.5, True))
    for change in (SAMPLER, {"top_entropy_quantile": 0.5}, {"off_policy_mask_threshold": 0.05})
]
CASES += [{"loss_type": "grpo", "importance_sampling_level": "sequence", **SAMPLER, "sequence_weights": True}]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()))
@pytest.mark.parametrize("on_policy", [False, pytest.param(True, marks=pytest.mark.gate)])
def test_loss_gradient_and_metrics_of_one_batch(
    case: dict[str, Any], on_policy: bool, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = batch(trained)
    if on_policy:
        del inputs["old_per_token_logps"]
    for name, value in case.items():
        if name == "sequence_weights":
            inputs["importance_sampling_ratio"] = inputs["importance_sampling_ratio"][:, :1]
        else:
            owner = trained.args if name.startswith("args.") else trained
            monkeypatch.setattr(owner, name.removeprefix("args."), value, raising=False)
    trained.model.train()
    assert mixin.loss_stays(trained, inputs) is None
    found = []
    for compute in (trained._compute_loss, functools.partial(trl.GRPOTrainer._compute_loss, trained)):
        trained._metrics["train"].clear()
        trained.model.zero_grad()
        loss = compute(trained.model, inputs)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trained.model.parameters() if p.grad is not None])
        found.append((loss.detach(), gradient, dict(trained._metrics["train"])))
    (loss, gradient, metrics), (their_loss, their_gradient, their_metrics) = found
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-4, atol=1e-6)
    assert metrics.keys() == their_metrics.keys()
    for name, values in metrics.items():
        assert values == pytest.approx(their_metrics[name], rel=1e-5, abs=1e-6), name


STAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "cispo's cap": ("a cap of cispo's ratio below 1", {"loss_type": "cispo"}),
    "vespo": ("loss_type=vespo", {"loss_type": "vespo"}),
    "entropy bonus": ("an entropy bonus", {"entropy_coef": 0.01}),
    "delta in the range": ("delta within the clip range", {"delta": 1.1, "epsilon": 0.2}),
}


@pytest.mark.gate
@pytest.mark.parametrize("name", STAYS)
def test_a_loss_that_stays_is_plain_trls(name: str, folder: Path, tokenizer: Any) -> None:
    reason, options = STAYS[name]
    ours, theirs = (run(kind, folder, tokenizer, **options) for kind in (Fused, trl.GRPOTrainer))
    assert mixin.loss_stays(ours, {"advantages": torch.zeros(2)}) == reason
    assert_same_run(ours, theirs, folder)
