"""A decode step on the meta device, and what it calls."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrl.rollout import Sampling
from fastrl.rollout.cache import PromptCache
from fastrl.rollout.decode import Decode, Start


class Recorded(TorchDispatchMode):
    """Counts operators that create or change values, and lists those with a tensor on another device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(not x.is_meta for x in (*given, *made)):
            self.elsewhere.append(str(func))
        storages = {x.untyped_storage()._cdata for x in given}
        if func._schema.is_mutable or any(x.untyped_storage()._cdata not in storages for x in made):
            self.calls[str(func)] += 1
        return out


def decode_of(core: Any, sampling: Sampling, prompts: int = 2) -> Decode:
    """A decode after its first token, with keys of prompts of 11 tokens."""
    text = core.config.text_config
    cache = PromptCache(prompts)
    cache.reserve(11)
    cache.length = [11, 7]
    size = text.hidden_size // text.num_attention_heads
    like = torch.empty(prompts, text.num_key_value_heads, 1, size, device="meta", dtype=torch.bfloat16)
    for layer in range(text.num_hidden_layers):
        cache.buffers(layer, like)
    start = Start(
        cache,
        torch.empty(prompts, text.vocab_size, device="meta", dtype=torch.bfloat16),
        torch.empty(prompts, dtype=torch.int64, device="meta"),
    )
    rows = prompts * sampling.n
    uniform = (
        None if sampling.greedy else torch.empty(rows, sampling.max_new_tokens, dtype=torch.float64, device="meta")
    )
    ids = {name: torch.empty(3, dtype=torch.int64, device="meta") for name in ("eos", "suppressed")}
    decode = Decode(core, start, sampling, uniform, **ids, mode="static")
    decode._record(start.logits.repeat_interleave(sampling.n, 0))
    return decode
