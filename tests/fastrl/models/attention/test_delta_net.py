"""Gated delta nets over a packed row and in a rollout's cache, against the layer's own forward for each text by itself.

In float64 the layer's own rule is replaced by the recurrence, because transformers computes it in float32.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrl.models.attention import delta_net
from fastrl.models.attention.delta_net import empty_state, is_delta_net, scan, share_states
from fastrl.models.attention.delta_rule import DeltaState
from fastrl.rollout.cache import PromptCache, RowCache, RowStep
from fastrl.segments import Segments, Span
from fastrl_kernels._gather_rows import Copies
from tests.helpers.delta import recurrence

HIDDEN = 16
MODELING = "transformers.models.qwen3_5.modeling_qwen3_5"


def exact_rule(
    query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, initial_state: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """transformers' rule as the recurrence, in the dtype of its inputs."""
    heads = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(heads, 2) for x in (query, key))
    memory = value.new_zeros(len(value), value.shape[2], key.shape[3], value.shape[3])
    return recurrence(query, key, value, g.to(value.dtype), beta, memory if initial_state is None else initial_state)


class ExactNorm(nn.Module):
    """transformers' gated norm in the dtype of its inputs."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * nn.functional.silu(gate)


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A layer in float64."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=5,
    )  # fmt: skip
    torch.manual_seed(0)
    made: Any = modeling.Qwen3_5GatedDeltaNet(config, 0).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        made.A_log.sub_(3)  # slow decays, so that the prompt counts in the answers
    made.norm = ExactNorm(made.norm)
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", exact_rule)
    share_states(nn.ModuleList([made]))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the layer's own decays
    return made


def own(net: Any, hidden: Tensor) -> Tensor:
    """transformers' forward of texts [B, T, hidden]."""
    return type(net).forward(net, hidden)


SPANS = {
    "one group": (Span(0, 7, (4, 2, 6)),),
    "ragged, empty and single answers": (Span(0, 5, (9, 0, 1, 4)), Span(19, 90, (3,)), Span(112, 12, (1, 1))),
    "prompts shorter than the convolution": (Span(0, 1, (1, 5)), Span(7, 2, (2, 8, 3))),
    "prompts padded together": (Span(0, 7, (3,)), Span(10, 5, (2, 4))),
    "no answer at all": (Span(0, 6, (0, 0)),),
}


def unshared(net: Any, row: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Each prompt and each prompt with one of its answers as texts of their own, put together as a row."""
    parts = []
    for span in spans:
        prompt = row[:, span.start : span.start + span.prompt]
        parts.append(own(net, prompt))
        at = span.start + span.prompt
        for length in span.completions:
            if length:
                parts.append(own(net, torch.cat([prompt, row[:, at : at + length]], 1))[:, span.prompt :])
            at += length
    return torch.cat(parts, 1)


def both(net: Any, spans: tuple[Span, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of the row and every parameter: shared and unshared."""
    segments, rng = Segments(spans), torch.Generator().manual_seed(1)
    row = torch.randn(1, segments.length, HIDDEN, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, segments.length, HIDDEN, generator=rng, dtype=torch.float64)
    found = []
    for out in (net(row, fastrl_segments=segments), unshared(net, row, spans)):
        found.append([out.detach(), *torch.autograd.grad((out * weight).sum(), [row, *net.parameters()])])
    return found[0], found[1]


@pytest.mark.parametrize("kind", SPANS)
def test_a_packed_row_is_every_text_by_itself_with_every_gradient(net: Any, kind: str) -> None:
    for got, want in zip(*both(net, SPANS[kind]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# Broken on purpose: the comparison must notice


def without_memory(real: Any) -> Any:
    return lambda x, copies: torch.zeros_like(real(x, copies)) if x.dim() == 4 else real(x, copies)


def without_window(real: Any) -> Any:
    return lambda x, copies: torch.zeros_like(real(x, copies)) if x.dim() == 3 else real(x, copies)


def of_the_first_prompt(real: Any) -> Any:
    return lambda x, copies: real(x, Copies.of(torch.zeros_like(copies.index), len(x)))


def without_gradient(real: Any) -> Any:
    return lambda x, copies: real(x, copies).detach()


@pytest.mark.parametrize("broken", [without_memory, without_window, of_the_first_prompt, without_gradient])
def test_a_state_that_does_not_reach_the_answers_is_noticed(
    net: Any, monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    monkeypatch.setattr(delta_net, "gather_rows", broken(delta_net.gather_rows))
    got, want = both(net, SPANS["ragged, empty and single answers"])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_padding_that_is_read_is_noticed(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = delta_net.scan
    monkeypatch.setattr(delta_net, "scan", lambda *args, **options: whole(*args, **{**options, "real": None}))
    got, want = both(net, SPANS["prompts padded together"])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got[0], want[0], rtol=1e-3, atol=1e-3)


def test_a_row_of_another_length_is_an_error(net: Any) -> None:
    with pytest.raises(ValueError, match="expected one row of 19 tokens, got \\[1, 18\\]"):
        net(torch.zeros(1, 18, HIDDEN, dtype=torch.float64), fastrl_segments=Segments(SPANS["one group"]))


# In a rollout's cache


def texts(lengths: list[int]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(2)
    return [torch.randn(1, n, HIDDEN, generator=rng, dtype=torch.float64) for n in lengths]


def padded(pieces: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence([x[0] for x in pieces], batch_first=True, padding_value=3.0)


@torch.no_grad()
@pytest.mark.parametrize("first", [[6, 6], [1, 9], [8, 2]])
def test_texts_are_read_piece_by_piece(net: Any, first: list[int]) -> None:
    """Right-padded together, then more of some of them, then token by token in rows of their own."""
    whole = texts([20, 20])
    want = [own(net, text) for text in whole]
    cache = PromptCache(2)
    append = cache.append([0, 1], first)
    got = net(padded([text[:, :n] for text, n in zip(whole, first, strict=True)]), fastrl_cache=append)
    append.commit()
    for text, n, out in zip(want, first, got, strict=True):
        torch.testing.assert_close(out[:n], text[0, :n], rtol=1e-9, atol=1e-9)
    append = cache.append([1], [4])
    more = net(whole[1][:, first[1] : first[1] + 4], fastrl_cache=append)
    append.commit()
    torch.testing.assert_close(more, want[1][:, first[1] : first[1] + 4], rtol=1e-9, atol=1e-9)
    cache.keys[0] = cache.values[0] = torch.zeros(2, 1, cache.capacity, 4)  # of an attention layer
    rows = RowCache(cache, 3, 8, static=False)
    at = [first[0], first[0], first[0], *[first[1] + 4] * 3]
    for _ in range(4):
        token = torch.cat([whole[n // 3][:, at[n] : at[n] + 1] for n in range(6)])
        out = net(token, fastrl_cache=RowStep(rows))
        for n in range(6):
            torch.testing.assert_close(out[n], want[n // 3][0, at[n] : at[n] + 1], rtol=1e-9, atol=1e-9)
            at[n] += 1


def row_cache(net: Any, *, static: bool) -> tuple[PromptCache, RowCache, list[Tensor]]:
    """Two prompts of 5 tokens with three rows each, and the rows' tokens."""
    prompts = texts([5, 5])
    cache = PromptCache(2)
    append = cache.append([0, 1], [5, 5])
    net(torch.cat(prompts), fastrl_cache=append)
    append.commit()
    cache.keys[0] = cache.values[0] = torch.zeros(2, 1, 5, 4)
    rng = torch.Generator().manual_seed(3)
    tokens = [torch.randn(1, 6, HIDDEN, generator=rng, dtype=torch.float64) for _ in range(6)]
    return cache, RowCache(cache, 3, 8, static=static), tokens


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_states_follow_their_rows_when_others_finish(net: Any, static: bool) -> None:
    prompts, rows, tokens = row_cache(net, static=static)
    before = DeltaState(*(part.clone() for part in prompts.states[0]))
    for t in range(2):
        net(torch.cat([x[:, t : t + 1] for x in tokens]), fastrl_cache=RowStep(rows))
        rows.advance()
        rows.step += 1
    kept, size = [1, 3, 5], 4 if static else 3
    address = rows.states[0].memory.data_ptr()
    rows.keep(torch.tensor(kept), size)
    assert (rows.states[0].memory.data_ptr() == address) == static
    assert [len(part) for part in rows.states[0]] == [size, size]
    for t in range(2, 5):
        now = [tokens[n][:, t : t + 1] for n in kept] + [tokens[0][:, :1]] * (size - 3)
        out = net(torch.cat(now), fastrl_cache=RowStep(rows))
        for n, got in zip(kept, out[:3], strict=True):
            text = torch.cat([texts([5, 5])[n // 3], tokens[n][:, : t + 1]], 1)
            torch.testing.assert_close(got, own(net, text)[0, -1:], rtol=1e-9, atol=1e-9)
    for part, old in zip(prompts.states[0], before, strict=True):
        assert torch.equal(part, old), "rows change the prompt's own state"


@torch.no_grad()
def test_a_state_that_answers_share_is_noticed(net: Any) -> None:
    """Rows whose memory is one and the same buffer, as an expanded view would be."""
    _, rows, tokens = row_cache(net, static=False)
    window, memory = rows.states[0]
    shared = memory[:1].expand_as(memory).contiguous()
    for n in range(6):  # row after row through one buffer
        rows.states[0] = DeltaState(window[n : n + 1], shared[:1])
        out = net(tokens[n][:, :1], fastrl_cache=RowStep(rows))
        text = torch.cat([texts([5, 5])[n // 3], tokens[n][:, :1]], 1)
        if n == 0:
            torch.testing.assert_close(out, own(net, text)[:, -1:], rtol=1e-9, atol=1e-9)
            continue
        with pytest.raises(AssertionError):
            torch.testing.assert_close(out, own(net, text)[:, -1:], rtol=1e-3, atol=1e-3)


# Which layers


def test_other_calls_are_the_layers_own(net: Any) -> None:
    (text,) = texts([9])
    assert torch.equal(net(text, fastrl_probe=object()), own(net, text))


def test_another_way_of_sharing_prompts_is_refused(net: Any) -> None:
    """Never ignored: the layer would read answers as if they had no prompt."""
    with pytest.raises(NotImplementedError, match="states from fastrl_answers"):
        net(texts([9])[0], fastrl_answers=object())


def test_a_layer_with_unknown_parts_is_not_switched(net: Any) -> None:
    assert is_delta_net(net)
    assert share_states(nn.ModuleList([net, nn.Linear(2, 2)])) == 1
    net.extra = nn.Identity()
    assert share_states(nn.ModuleList([net])) == 0
    del net.extra
    net.gain = nn.Parameter(torch.ones(1))
    assert not is_delta_net(net)


def test_a_switched_layer_is_copied_with_its_forward(net: Any) -> None:
    import copy

    other = copy.deepcopy(net)
    assert isinstance(other.forward, MethodType)
    assert other.forward.__self__ is other


def test_nothing_read_is_a_state_of_zeros(net: Any) -> None:
    (text,) = texts([3])
    x = delta_net.Inputs(net.in_proj_qkv(text), torch.zeros(1, 3, 4, dtype=torch.float64), torch.zeros(1, 3, 4))
    state = empty_state(net, x)
    assert [tuple(part.shape) for part in state] == [(1, 3, 44), (1, 4, 6, 5)]
    assert not any(part.any() for part in state)
    with torch.no_grad():
        assert torch.equal(scan(net, x, None)[0], scan(net, x, state)[0])
