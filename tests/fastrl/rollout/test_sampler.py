"""The sampler: distribution, truncation, suppression, log-probs, arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastrl.rollout import Sampling, sample

NONE = torch.tensor([], dtype=torch.int64)


def kept_tokens(logits: list[float], temperature: float, top_k: int, top_p: float, suppressed: list[int]) -> dict:
    """The truncated distribution, written out: token → probability."""
    scaled = {i: x / temperature for i, x in enumerate(logits) if i not in suppressed}
    order = sorted(scaled, key=lambda i: -scaled[i])[: top_k or None]
    peak = scaled[order[0]]
    weight = {i: float(torch.tensor(scaled[i] - peak, dtype=torch.float64).exp()) for i in order}
    total = sum(weight.values())
    kept, before = {}, 0.0
    for i in order:
        if before / total >= top_p:
            break
        kept[i] = weight[i]
        before += weight[i]
    return {i: w / sum(kept.values()) for i, w in kept.items()}


def draws(logits: torch.Tensor, sampling: Sampling, count: int, suppressed: torch.Tensor = NONE) -> torch.Tensor:
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return sample(logits.expand(count, -1), sampling, uniform, suppressed).token


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 4, 1.0), (1.0, 0, 0.6), (0.7, 5, 0.8), (1.0, 100, 0.9)],
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.9, -0.2, 1.4, 5.0, 0.0])
    expected = kept_tokens(logits.tolist(), temperature, top_k, top_p, [6])
    sampling = Sampling(1, 1, temperature, top_p, top_k)
    tokens = draws(logits, sampling, 8_000, torch.tensor([6]))
    counts = torch.bincount(tokens, minlength=8)
    assert set(counts.nonzero().flatten().tolist()) == set(expected)
    if len(expected) > 1:
        observed = [int(counts[i]) for i in expected]
        assert stats.chisquare(observed, [8_000 * p for p in expected.values()]).pvalue > 1e-3


@given(
    logits=st.lists(st.integers(-60, 60).map(lambda x: x / 8), min_size=2, max_size=12, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.37, 0.83, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_draw_is_a_token_that_truncation_keeps(logits, temperature, top_k, top_p, uniform) -> None:
    suppressed = [0]
    kept = kept_tokens(logits, temperature, top_k, min(1.0, top_p + 1e-6), suppressed)
    drawn = sample(
        torch.tensor([logits]),
        Sampling(1, 1, temperature, top_p, top_k),
        torch.tensor([uniform], dtype=torch.float64),
        torch.tensor(suppressed),
    )
    assert drawn.token.item() in kept
    truth = torch.log_softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0)[drawn.token.item()]
    assert abs(drawn.logp.item() - truth.item()) < 1e-4


@pytest.mark.parametrize("vocabulary", [1025, 9000, 40000])
def test_a_large_vocabulary_is_drawn_from_as_a_small_one(vocabulary: int) -> None:
    """In blocks: the token at that point of the cumulative distribution, never one of probability 0."""
    logits = 4 * torch.randn(64, vocabulary)
    gone = torch.randperm(vocabulary)[: vocabulary // 2]
    logits[0], logits[1, 1:], logits[2, :-1] = 0.0, -1e9, -1e9  # flat; only the first token; only the last
    gone = gone[(gone > 0) & (gone < vocabulary - 1)]
    uniform = torch.rand(64, dtype=torch.float64)
    uniform[3:6] = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
    drawn = sample(logits, Sampling(1, 1), uniform, gone).token
    probability = logits.double().index_fill(1, gone, -torch.inf).softmax(-1)
    upper = probability.cumsum(-1)
    assert (probability.gather(1, drawn[:, None]) > 0).all()
    assert drawn[1:3].tolist() == [0, vocabulary - 1]
    high = upper.gather(1, drawn[:, None])[:, 0]
    low = high - probability.gather(1, drawn[:, None])[:, 0]
    rounding = 1e-5  # of the float32 softmax
    assert ((low - rounding <= uniform) & (uniform <= high + rounding)).all()


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"temperature": 0.0}])
@pytest.mark.parametrize("vocabulary", [7, 1994, 2048])
def test_logits_that_are_not_numbers_are_seen_in_the_logp(vocabulary: int, options: dict) -> None:
    uniform = torch.tensor([0.1, 0.9], dtype=torch.float64)
    drawn = sample(torch.full((2, vocabulary), torch.nan), Sampling(1, 1, **options), uniform, torch.tensor([0]))
    assert ((drawn.token >= 0) & (drawn.token < vocabulary)).all()
    assert drawn.logp.isnan().all()


def test_small_top_p_and_top_k_one_are_greedy() -> None:
    logits = torch.randn(64, 33)
    uniform = torch.rand(64, dtype=torch.float64)
    greedy = sample(logits, Sampling(1, 1, temperature=0), None, NONE).token
    assert torch.equal(greedy, logits.argmax(-1))
    assert torch.equal(sample(logits, Sampling(1, 1, top_p=1e-6), uniform, NONE).token, greedy)
    assert torch.equal(sample(logits, Sampling(1, 1, top_k=1), uniform, NONE).token, greedy)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 0.0}])
def test_suppressed_tokens_are_never_drawn(options: dict) -> None:
    logits = torch.randn(500, 16)
    logits[:, [2, 15]] += 1000.0  # they would have all the probability
    uniform = torch.rand(500, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    drawn = sample(logits, Sampling(1, 1, **options), uniform, torch.tensor([2, 15]))
    assert not torch.isin(drawn.token, torch.tensor([2, 15])).any()
    # log-probs are of the full vocabulary: most of its probability is on tokens that may not be drawn
    truth = torch.log_softmax(logits.double(), -1).gather(-1, drawn.token[:, None])[:, 0]
    torch.testing.assert_close(drawn.logp.double(), truth, rtol=1e-6, atol=1e-6)
    assert (drawn.logp < -900).all()


def test_logp_is_at_the_sampling_temperature_and_one_if_greedy() -> None:
    logits = torch.randn(5, 9, dtype=torch.bfloat16)
    uniform = torch.rand(5, dtype=torch.float64)
    for temperature, used in ((0.5, 0.5), (2.0, 2.0), (0.0, 1.0)):
        drawn = sample(logits, Sampling(1, 1, temperature), uniform, NONE)
        truth = torch.log_softmax(logits.double() / used, -1).gather(-1, drawn.token[:, None])[:, 0]
        torch.testing.assert_close(drawn.logp.double(), truth, rtol=1e-5, atol=1e-6)
        assert drawn.logp.dtype == torch.float32


def test_logits_are_not_changed() -> None:
    logits = torch.randn(3, 7)
    before = logits.clone()
    sample(logits, Sampling(1, 1), torch.rand(3, dtype=torch.float64), torch.tensor([1]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0, "max_new_tokens": 1}, "n: expected 1 or more completions per prompt, got 0"),
        ({"n": 1, "max_new_tokens": 0}, "max_new_tokens: expected 1 or more, got 0"),
        ({"n": 1, "max_new_tokens": 1, "temperature": -1.0}, "temperature: expected 0"),
        ({"n": 1, "max_new_tokens": 1, "temperature": float("nan")}, "temperature: expected 0"),
        ({"n": 1, "max_new_tokens": 1, "top_p": 0.0}, "top_p: expected more than 0 and at most 1, got 0.0"),
        ({"n": 1, "max_new_tokens": 1, "top_k": -1}, "top_k: expected 0"),
    ],
)
def test_bad_sampling_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Sampling(**values)


def test_sampling_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="uniform: needed unless the temperature is 0"):
        sample(torch.randn(1, 4), Sampling(1, 1), None, NONE)
