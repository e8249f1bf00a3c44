"""The gated delta rule in chunks and in single steps, against the recurrence in float64, token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.models.attention.delta_rule import DeltaState, convolve, delta_rule, delta_step, next_window
from tests.helpers.counting import cost
from tests.helpers.delta import recurrence

SIZES = {"rows": 2, "heads": 3, "dk": 4, "dv": 5}


def tensors(length: int, *, dtype: torch.dtype = torch.float64, seed: int = 0, slow: bool = False) -> list[Tensor]:
    """query, key, value, log decay, rate, memory. ``slow``: decays near 1, so that early tokens still count."""
    rng = torch.Generator().manual_seed(seed)
    b, h, dk, dv = SIZES.values()
    shapes = [(b, length, h, dk), (b, length, h, dk), (b, length, h, dv), (b, length, h), (b, length, h)]
    q, k, v, decay, rate = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    decay = -F.softplus(decay) * (0.01 if slow else 3.0)
    memory = torch.randn(b, h, dk, dv, generator=rng, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, decay, rate.sigmoid(), memory)]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("length", [1, 3, 4, 9, 70])
def test_chunks_are_the_recurrence_with_every_gradient(length: int, chunk: int, slow: bool) -> None:
    given = [x.requires_grad_() for x in tensors(length, slow=slow)]
    got, want = delta_rule(*given, chunk=chunk), recurrence(*given)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in want]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    found = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights, strict=True)), given) for out in (got, want)
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_float32_is_close_to_float64() -> None:
    wide, narrow = tensors(150, slow=True), tensors(150, slow=True, dtype=torch.float32)
    for got, want in zip(delta_rule(*narrow), recurrence(*wide), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_low_precision_inputs_are_computed_in_the_memorys_dtype() -> None:
    *given, memory = tensors(20, dtype=torch.bfloat16)
    out, end = delta_rule(*given, memory.float())
    want, last = recurrence(*(x.double() for x in given), memory.double())
    assert out.dtype == end.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end.double(), last, rtol=1e-5, atol=1e-5)


def test_strong_decays_stay_finite_with_their_gradients() -> None:
    q, k, v, decay, rate, memory = (x.requires_grad_() for x in tensors(80, dtype=torch.float32))
    out, end = delta_rule(q, k, v, decay * 200, rate, memory)
    (out.sum() + end.sum()).backward()
    for x in (out, end, q.grad, k.grad, v.grad, decay.grad, rate.grad, memory.grad):
        assert x is not None
        assert x.isfinite().all()


def test_padding_of_decay_one_and_rate_zero_changes_nothing() -> None:
    q, k, v, decay, rate, memory = tensors(12)
    _, want = delta_rule(*(x[:, :7] for x in (q, k, v, decay, rate)), memory)
    decay[:, 7:], rate[:, 7:] = 0, 0
    out, end = delta_rule(q, k, v, decay, rate, memory, chunk=5)
    torch.testing.assert_close(end, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[:, :7], recurrence(q, k, v, decay, rate, memory)[0][:, :7])


def test_bytes_and_flops_are_linear_in_the_length() -> None:
    """An index per chunk would allocate the whole text's tensors again for each in the backward."""

    def learn(length: int) -> None:
        given = [x.requires_grad_() for x in tensors(length, dtype=torch.float32)]
        delta_rule(*given)[0].sum().backward()

    short, long = cost(lambda: learn(256)), cost(lambda: learn(1024))
    assert long.bytes < 4.2 * short.bytes
    assert long.flops < 4.2 * short.flops


def test_the_outputs_need_no_final_memory() -> None:
    given = tensors(11)
    assert torch.equal(delta_rule(*given, chunk=4, final=False)[0], delta_rule(*given, chunk=4)[0])


def test_steps_change_the_memory_in_place_as_the_recurrence_does() -> None:
    q, k, v, decay, rate, memory = tensors(6)
    want, last = recurrence(q, k, v, decay, rate, memory)
    for t in range(6):
        out = delta_step(q[:, t], k[:, t], v[:, t], decay[:, t], rate[:, t], memory)
        torch.testing.assert_close(out, want[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(memory, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("read", [0, 1, 2, 4])
def test_a_convolution_goes_on_behind_its_window(length: int, read: int) -> None:
    """What was read before comes in as a window: as one convolution over the whole text."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, read + length, 6, generator=rng, dtype=torch.float64)
    weight, bias = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((6, 4), (6,)))
    padded = F.pad(x, (0, 0, 3, 0))
    want = torch.stack([(padded[:, t : t + 4] * weight.T).sum(1) for t in range(read + length)], 1) + bias
    window = next_window(x[:, :read], x.new_zeros(2, 3, 6), None)
    torch.testing.assert_close(convolve(x[:, read:], weight, bias, window), want[:, read:], rtol=1e-12, atol=1e-12)


def test_a_window_ends_with_each_texts_last_token() -> None:
    x = torch.arange(1.0, 11.0).view(2, 5, 1)
    got = next_window(x, torch.zeros(2, 3, 1), torch.tensor([2, 5]))
    assert got[..., 0].tolist() == [[0, 1, 2], [8, 9, 10]]


def test_the_bytes_of_a_state_are_those_of_one_text() -> None:
    state = DeltaState(torch.zeros(7, 3, 10, dtype=torch.bfloat16), torch.zeros(7, 2, 4, 5))
    assert state.row_bytes == 3 * 10 * 2 + 2 * 4 * 5 * 4
