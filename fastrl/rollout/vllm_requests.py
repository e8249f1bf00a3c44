"""A prompt as a chat completion request to a vLLM server, and a reply as completions.

Images are sent as PNGs of their resized pixels, whose size the server's preprocessing does not change. The server
applies the chat template and tokenises by itself, so every reply is checked: the prompt ids that it reports must equal
ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastrl.batch import Completion, Prompt
from fastrl.data.pictures import data_url
from fastrl.http import TransientError
from fastrl.rollout.generator import rows_per_prompt
from fastrl.rollout.sampler import Sampling
from fastrl.rollout.vllm_weights import RolloutError

FORBID = -100.0  # the lowest bias the API accepts: multiplies a token's odds by e^-100


def chat_request(policy: Any, prompt: Prompt, sampling: Sampling, seed: int | None) -> dict[str, Any]:
    """A chat completion request without its model. It sets everything that a model folder's generation config could
    change on the server (penalties, truncation, stop tokens).

    Raises:
        ValueError: a server would not tokenise the prompt as the policy does.
    """
    generate, add_bos = _rendering(policy, prompt)
    images = iter(prompt.images)

    def content(parts: str | Sequence[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if isinstance(parts, str):
            return parts
        return [
            {"type": "image_url", "image_url": {"url": data_url(policy.preprocessor.picture(next(images)))}}
            if part["type"] == "image"
            else part
            for part in parts
        ]

    options = dict(policy.family.template_options)
    return {
        **({"chat_template_kwargs": options} if options else {}),
        "messages": [{**message, "content": content(message["content"])} for message in prompt.messages],
        "add_generation_prompt": generate,
        "add_special_tokens": add_bos,
        "n": rows_per_prompt(sampling),
        "max_completion_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "ignore_eos": True,  # the server's idea of EOS; the policy's follow
        "stop_token_ids": list(policy.eos_token_ids),
        "logit_bias": {str(token): FORBID for token in policy.suppressed_token_ids},
        "logprobs": True,
        "top_logprobs": 0,
        "return_token_ids": True,
    }


def _rendering(policy: Any, prompt: Prompt) -> tuple[bool, bool]:
    """Whether the server must add a generation prompt, and whether its tokenizer must add a BOS token that the chat
    template does not write.

    Raises:
        ValueError: a server would not tokenise the prompt as the policy does: it has no messages, it has more
            images than vLLM accepts for this family, or the chat template alone renders it differently.
    """
    family, tokenizer = policy.family, policy.tokenizer
    if not prompt.messages:
        raise ValueError("a prompt without messages cannot be sent to a vLLM server: encode it from a record")
    limit = family.served_images
    if limit is not None and len(prompt.images) > limit:
        raise ValueError(
            f"rollout.backend vllm: a prompt has {len(prompt.images)} images; for model type {family.model_type} "
            f"at most {limit} can be sent to a vLLM server; use rollout.backend: local"
        )
    generate = prompt.messages[-1]["role"] != "assistant"
    text = tokenizer.apply_chat_template(
        list(prompt.messages), tokenize=False, add_generation_prompt=generate, **family.template_options
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    add_bos = family.lacks_bos(tokenizer, ids)
    ids = torch.tensor([tokenizer.bos_token_id] * add_bos + ids, dtype=torch.int64)
    if not torch.equal(family.lay_out(ids, prompt.images).ids, prompt.token_ids):
        raise ValueError(
            f"rollout.backend vllm: the chat template of this {family.model_type} model renders a prompt "
            "differently from the trainer, which keeps each assistant turn as it was generated, end-of-turn token "
            "included; use rollout.backend: local for dialogues"
        )
    return generate, add_bos


def choices_of(
    policy: Any, prompt: Prompt, reply: Any, *, url: str, base: str, name: str, count: int
) -> list[dict[str, Any]]:
    """The choices of one reply, ordered by index, checked to come from the requested weights and our prompt ids.

    Args:
        policy, prompt: whose ids the server must have read.
        reply: of the server at ``url``, which calls its base model ``base``.
        name, count: the model and the number of answers that were requested.

    Raises:
        TransientError: it is not a chat completion.
        RolloutError: it is one to another request.
    """
    try:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        read, model = reply.get("prompt_token_ids"), reply.get("model")
    except (TypeError, KeyError, AttributeError):
        raise TransientError(f"a response that is not a chat completion: {str(reply)[:80]!r}") from None
    problem = ""
    if model != name:
        problem = f"answered with {model!r}, not with the requested weights, {name!r}"
    elif not isinstance(read, list):
        problem = "returns no token ids: it is too old to support return_token_ids"
    elif read != prompt.token_ids.tolist():
        problem = _misread(policy, base, read, prompt)
    elif len(choices) != count:
        problem = f"gave {len(choices)} answers where {count} were requested"
    if problem:
        raise RolloutError(f"the vLLM server at {url} {problem}")
    return choices


def _misread(policy: Any, model: str, read: list[int], prompt: Prompt) -> str:
    ours, image = prompt.token_ids.tolist(), policy.family.image_token
    at = next((i for i, (a, b) in enumerate(zip(read, ours, strict=False)) if a != b), min(len(read), len(ours)))

    def shown(ids: list[int]) -> str:
        near = ids[max(0, at - 2) : at + 6]
        return f"{near} {policy.tokenizer.decode(near)!r}"

    return (
        f"(it serves {model}) reads a prompt as {len(read)} tokens, {read.count(image)} of images; "
        f"this policy reads it as {len(ours)} tokens, {ours.count(image)} of images. From token {at} on, the "
        f"server: {shown(read)}, this policy: {shown(ours)}. The server must serve the folder that the policy was "
        "loaded from, with the same tokenizer, chat template and image limits"
    )


def completions_of(policy: Any, url: str, choices: Sequence[dict[str, Any]], sampling: Sampling) -> list[Completion]:
    """Completions of the choices of a reply from ``url``; the text is decoded here from the token ids.

    Raises:
        TransientError: the server gave up an answer.
        RolloutError: an answer is not one to the request, or has log-probs that are not finite.
    """
    found = []
    for choice in choices:
        ids, logps = tokens_of(choice)
        if choice.get("finish_reason") == "abort":
            raise TransientError("the server gave up an answer midway")
        ends = [token in policy.eos_token_ids for token in ids]
        problem = ""
        if any(ends[:-1]) or len(ids) > sampling.max_new_tokens:
            problem = "goes on after its end of turn, or after max_new_tokens"
        elif not ends[-1] and len(ids) < sampling.max_new_tokens:
            problem = f"ends after {len(ids)} tokens without an end of turn"
        elif forbidden := set(ids) & set(policy.suppressed_token_ids):
            problem = f"contains tokens that logit_bias forbids: {sorted(forbidden)}"
        elif not all(math.isfinite(value) and -1000 < value < 1e-3 for value in logps):  # vLLM sends -inf as -9999
            problem = "has log-probs that are not finite (have the weights diverged?)"
        if problem:
            raise RolloutError(f"the vLLM server at {url}: an answer {problem}")
        tokens = torch.tensor(ids, dtype=torch.int64)
        logp = torch.tensor(logps, dtype=torch.float32)
        found.append(Completion(tokens, text=policy.decode(tokens), finished=ends[-1], sampler_logp=logp, sampler=url))
    return found


def tokens_of(choice: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Token ids and log-probs of a choice. Raises ``TransientError`` if any is missing."""
    try:
        ids = [int(token) for token in choice["token_ids"]]
        logps = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
    except (TypeError, KeyError, ValueError):
        ids, logps = [], []
    if not ids or len(ids) != len(logps):
        raise TransientError(f"an answer without a log-prob for each of its token ids: {str(choice)[:80]!r}")
    return ids, logps
