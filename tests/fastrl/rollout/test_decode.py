"""The modes of decoding (eager, static, graph) give the same tokens and log-probs."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.batch import Completion
from fastrl.models.decode_layers import DecodeLayers
from fastrl.models.load import load_policy
from fastrl.rollout import Generator, Sampling, cache, decode, generator, graphs
from fastrl.rollout.cache import PromptCache, RowCache
from fastrl.rollout.decode import Decode, decode_mode
from tests.helpers.rollouts import STYLES, encode, force, reference_generate, rng, same, teacher_forced
from tests.helpers.tape import read_no_groups, stand_in


@pytest.fixture(params=STYLES)
def policy(request, tiny_folder):
    return load_policy(tiny_folder(request.param), device="cpu")


@pytest.fixture
def qwen2_5(tiny_folder):
    return load_policy(tiny_folder("qwen2_5"), device="cpu")


@pytest.fixture
def small_buckets(monkeypatch) -> None:
    """Small buckets, so that a test's batches shrink through several of them."""
    monkeypatch.setattr(decode, "SMALLEST_BUCKET", 2)


@pytest.fixture
def widths(monkeypatch) -> list[int]:
    """Rows of each decode step."""
    seen: list[int] = []
    real = DecodeLayers.__call__
    monkeypatch.setattr(
        DecodeLayers, "__call__", lambda self, token, *x: seen.append(len(token)) or real(self, token, *x)
    )
    return seen


def assert_same(got: list[list[Completion]], want: list[list[Completion]], tolerance: float = 1e-4) -> None:
    assert same(got, want)
    for left, right in zip(got, want, strict=True):
        for a, b in zip(left, right, strict=True):
            assert a.text == b.text
            torch.testing.assert_close(a.sampler_logp, b.sampler_logp, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sampling", [Sampling(8, 20), Sampling(8, 20, 1.2, 0.95, 150)], ids=["all", "truncated"])
def test_static_gives_what_eager_gives(policy, sampling: Sampling, small_buckets, widths: list[int]) -> None:
    """Prompts of different lengths, with and without pictures; rows that end at different steps."""
    hook = force(policy, policy.eos_token_ids[0], 3.0)
    prompts = encode(policy)
    want = Generator(policy, decode="eager").generate(prompts, sampling, rng())
    eager = widths[:]
    widths.clear()
    got = Generator(policy, decode="static").generate(prompts, sampling, rng())
    hook.remove()
    assert_same(got, want)
    assert len({len(c.token_ids) for completions in got for c in completions}) > 3
    assert len(set(widths)) > 1, "went through several buckets"
    assert all(width == widths[0] or width & (width - 1) == 0 for width in widths)
    assert len(widths) == len(eager)


def test_static_greedy_equals_transformers_generate_and_the_trainer(policy, small_buckets) -> None:
    prompts = encode(policy)
    out = Generator(policy, decode="static").generate(prompts, Sampling(1, 16, temperature=0))
    for prompt, (completion,) in zip(prompts, out, strict=True):
        assert completion.token_ids.tolist() == reference_generate(policy, prompt, 16).tolist()
        assert completion.sampler_logp is not None
        want = teacher_forced(policy, prompt, completion)
        torch.testing.assert_close(completion.sampler_logp, want, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", ["eager", "static"])
def test_interpreted_kernels_decode_what_transformers_generates(policy, mode: str) -> None:
    """A decode with the Triton kernels of a GPU."""
    prompts = encode(policy)
    out = Generator(policy, decode=mode).generate(prompts, Sampling(1, 5, temperature=0))
    for prompt, (completion,) in zip(prompts, out, strict=True):
        assert completion.token_ids.tolist() == reference_generate(policy, prompt, 5).tolist()
        assert completion.sampler_logp is not None


def test_static_session_goes_on_after_more_was_said(policy, small_buckets) -> None:
    """The prompts' buffers grow between turns; each turn decodes with a new static cache."""
    prompts = encode(policy)
    message = [torch.randint(0, 250, (n,), generator=rng(n)) for n in (3, 9, 0, 1, 20)]
    sessions = [Generator(policy, decode=mode).session(prompts) for mode in ("eager", "static")]
    for turn in range(2):
        want, got = (session.generate(Sampling(3, 8), rng(turn)) for session in sessions)
        assert_same(got, want)
        for session in sessions:
            session.extend(message)


def test_static_under_lora_and_after_an_update_uses_the_present_weights(tiny_folder) -> None:
    """No weights are cached between calls: adapters stay separate, and in-place updates take effect."""
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu", lora={"rank": 4, "dropout": 0.5})
    prompts, sampling = encode(policy), Sampling(2, 8)
    static = Generator(policy, decode="static")
    before = static.generate(prompts, sampling, rng())
    pointers = {p.data_ptr() for p in policy.core.parameters()}
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=rng(1))
    after = static.generate(prompts, sampling, rng())
    assert not same(before, after)
    assert_same(after, Generator(policy).generate(prompts, sampling, rng()))
    assert {p.data_ptr() for p in policy.core.parameters()} == pointers
    with policy.reference():
        assert_same(static.generate(prompts, sampling, rng()), before)


def test_finished_rows_retire_without_changing_the_rest(qwen2_5, monkeypatch, widths: list[int]) -> None:
    """Rows end at different steps; batches shrink; samples equal those of a loop that never retires rows."""
    hook = force(qwen2_5, qwen2_5.eos_token_ids[0], 4.0)
    prompts, sampling = encode(qwen2_5), Sampling(6, 16)
    out = Generator(qwen2_5, decode="eager").generate(prompts, sampling, rng())
    shrunk = widths[:]
    monkeypatch.setattr(Decode, "_smaller", lambda self, alive: len(self.rows))
    truth = Generator(qwen2_5, decode="eager").generate(prompts, sampling, rng())
    hook.remove()
    assert_same(out, truth)
    assert shrunk[0] > shrunk[-1]
    assert shrunk == sorted(shrunk, reverse=True)
    assert len({len(c.token_ids) for completions in out for c in completions}) > 3


def test_a_small_batch_keeps_its_bucket(qwen2_5, widths: list[int]) -> None:
    """Below the smallest bucket a step is no faster, so no rows move and no graph is captured again."""
    hook = force(qwen2_5, qwen2_5.eos_token_ids[0], 4.0)
    Generator(qwen2_5, decode="static").generate(encode(qwen2_5), Sampling(6, 12), rng())
    hook.remove()
    assert set(widths) == {30}


# Requirements of a CUDA graph, checked without one


@pytest.mark.parametrize("sampling", [Sampling(8, 20), Sampling(8, 20, 1.2, 0.95, 150)], ids=["all", "truncated"])
def test_a_step_recorded_once_per_bucket_and_replayed_gives_the_same(
    policy, sampling: Sampling, small_buckets, monkeypatch
) -> None:
    """The semantics of a graph without a GPU: a step's operators are recorded, undone, and repeated on the same
    memory."""
    hook = force(policy, policy.eos_token_ids[0], 3.0)
    prompts = encode(policy)
    want = Generator(policy).generate(prompts, sampling, rng())
    counted = stand_in(monkeypatch, graphs)
    monkeypatch.setattr(generator, "decode_mode", lambda *_: "graph")
    got = Generator(policy).generate(prompts, sampling, rng())
    again = Generator(policy).generate(prompts, sampling, rng())
    hook.remove()
    assert_same(got, want)
    assert_same(again, want)
    assert counted.captures > 2, "a graph per bucket"
    assert counted.replays > 2 * counted.captures


@pytest.mark.parametrize("sampling", [Sampling(4, 20), Sampling(4, 20, 1.2, 0.95, 150)], ids=["all", "truncated"])
def test_later_chunks_replay_the_graphs_of_the_first(policy, sampling: Sampling, small_buckets, monkeypatch) -> None:
    """Chunks of two prompts: graphs are captured for buckets that are new, at addresses that stay; other prompts, other
    lengths, other numbers of rows. A rollout leaves nothing behind."""
    hook = force(policy, policy.eos_token_ids[0], 3.0)
    prompts = [*encode(policy), *encode(policy)[1:]]
    want = Generator(policy, decode="eager").generate(prompts, sampling, rng())
    counted = stand_in(monkeypatch, graphs)
    read_no_groups(monkeypatch)
    monkeypatch.setattr(generator, "decode_mode", lambda *_: "graph")
    alive = lambda: sum(isinstance(x, RowCache | PromptCache | Decode) for x in gc.get_objects())  # noqa: E731
    gc.collect()
    before, sizes = alive(), set[int]()
    capture = graphs.GraphRunner._capture
    monkeypatch.setattr(
        graphs.GraphRunner, "_capture", lambda self: sizes.add(len(self.step.__self__.rows)) or capture(self)
    )
    made: list[int] = []
    init = Decode.__init__
    monkeypatch.setattr(Decode, "__init__", lambda self, *x, **y: made.append(1) or init(self, *x, **y))
    got = Generator(policy, max_rows=8).generate(prompts, sampling, rng())
    hook.remove()
    assert_same(got, want)
    assert len(prompts) == 9
    assert len(made) == 2, "one for four chunks of two prompts, one for the last"
    assert counted.captures <= len(sizes) + 2
    assert counted.replays > 10
    assert alive() == before


def test_a_chunk_that_fails_leaves_nothing(qwen2_5, monkeypatch) -> None:
    stand_in(monkeypatch, graphs)
    monkeypatch.setattr(generator, "decode_mode", lambda *_: "graph")
    real, calls = Decode.restart, []
    monkeypatch.setattr(Decode, "restart", lambda self, *x: calls.append(1) or (real(self, *x) and 1 / 0))
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(x, RowCache) for x in gc.get_objects())
        with pytest.raises(ZeroDivisionError):
            Generator(qwen2_5, max_rows=4).generate(encode(qwen2_5), Sampling(2, 8), rng())
        assert calls == [1]
    finally:
        gc.enable()
    gc.collect()
    assert sum(isinstance(x, RowCache) for x in gc.get_objects()) == before


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Own keys grow several times within a test's answers."""
    monkeypatch.setattr(cache, "OWN_BLOCK", 5)


@pytest.mark.parametrize("mode", ["eager", "native", "static", "graph"])
def test_keys_that_grow_in_blocks_give_the_same(qwen2_5, mode: str, small_buckets, small_blocks, monkeypatch) -> None:
    hook = force(qwen2_5, qwen2_5.eos_token_ids[0], 3.0)
    prompts, sampling = encode(qwen2_5), Sampling(8, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "OWN_BLOCK", 64)
        want = Generator(qwen2_5, decode="eager").generate(prompts, sampling, rng())
    counted = stand_in(monkeypatch, graphs)
    monkeypatch.setattr(generator, "decode_mode", lambda *_: mode)
    grown: list[int] = []
    real = RowCache.reserve
    monkeypatch.setattr(
        RowCache, "reserve", lambda self, count: real(self, count) and (grown.append(self.capacity) or True)
    )
    got = Generator(qwen2_5).generate(prompts, sampling, rng())
    hook.remove()
    assert_same(got, want)
    assert grown == [10, 15, 19]
    assert (counted.captures > 0) == (mode == "graph")


def held_keys(row: RowCache) -> int:
    return sum(x.untyped_storage().nbytes() for x in (*row.keys.values(), *row.values.values()))


def test_answers_that_end_early_never_hold_keys_of_the_full_length(qwen2_5, small_blocks, monkeypatch) -> None:
    """Counted: bytes of the rows' own keys at the end of a rollout, by the length at which answers end."""
    held: list[int] = []
    run = Decode._run

    def counting(self: Decode) -> None:
        run(self)
        held.append(held_keys(self.cache))

    monkeypatch.setattr(Decode, "_run", counting)
    monkeypatch.setattr(Decode, "_smaller", lambda self, alive: len(self.rows))
    prompts = encode(qwen2_5)
    for bonus, limit in ((50.0, 31), (-50.0, 31), (-50.0, 6)):
        hook = force(qwen2_5, qwen2_5.eos_token_ids[0], bonus)
        Generator(qwen2_5, decode="static").generate(prompts, Sampling(2, limit), rng())
        hook.remove()
    early, late, short = held
    assert early == short
    assert late == 6 * early


def test_growing_holds_one_buffer_twice_at_most() -> None:
    """Counted on the meta device: the peak while own keys of four layers grow is one buffer above the result."""
    from fastrl.plan.ledger import Ledger

    meta = torch.device("meta")
    prompts = PromptCache(2)
    for layer in range(4):
        prompts.reserve(3)
        prompts.buffers(layer, torch.empty(2, 1, 3, 8, device=meta))
    with Ledger([*prompts.keys.values(), *prompts.values.values()], gpu=True) as ledger:
        row = RowCache(prompts, 3, 1000, static=True)
        before, ledger.peak = held_keys(row), 0
        assert before == 2 * 4 * 6 * 256 * 8 * 4
        assert not row.reserve(256)
        row.step = 256
        assert row.reserve(257)
        assert held_keys(row) == 2 * before
        assert ledger.peak - ledger.live <= 2 * before // 8
        row.step = 500
        assert row.reserve(999)
        assert row.capacity == 1000


def test_a_step_that_failed_leaves_the_collector_and_no_keys(qwen2_5, monkeypatch) -> None:
    stand_in(monkeypatch, graphs)
    monkeypatch.setattr(generator, "decode_mode", lambda *_: "graph")
    monkeypatch.setattr(decode, "sample", lambda *_: 1 / 0)
    gc.collect()
    before = sum(isinstance(x, RowCache) for x in gc.get_objects())
    with pytest.raises(ZeroDivisionError):
        Generator(qwen2_5).generate(encode(qwen2_5), Sampling(2, 8), rng())
    assert gc.isenabled()
    assert sum(isinstance(x, RowCache) for x in gc.get_objects()) == before


def test_static_buffers_never_move(qwen2_5, small_buckets, monkeypatch) -> None:
    """Keys are compacted in place, so retiring rows needs no second cache."""
    pointers: list[set[int]] = []
    real = RowCache.keep

    def keep(self: RowCache, rows: Tensor, size: int) -> None:
        real(self, rows, size)
        pointers.append({x.data_ptr() for x in (*self.keys.values(), *self.values.values())})

    monkeypatch.setattr(RowCache, "keep", keep)
    hook = force(qwen2_5, qwen2_5.eos_token_ids[0], 4.0)
    Generator(qwen2_5, decode="static").generate(encode(qwen2_5), Sampling(6, 16), rng())
    hook.remove()
    assert len(pointers) > 1
    assert len(set(map(frozenset, pointers))) == 1


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_keys_are_freed_when_generate_returns(qwen2_5, mode: str) -> None:
    """Before the backward; even the garbage collector is not needed."""
    alive = lambda: [x for x in gc.get_objects() if isinstance(x, RowCache | PromptCache)]  # noqa: E731
    gc.collect()
    before = len(alive())
    gc.disable()
    try:
        out = Generator(qwen2_5, decode=mode).generate(encode(qwen2_5), Sampling(2, 4), rng())
        assert len(alive()) == before
    finally:
        gc.enable()
    assert out


def test_the_mode_follows_the_device_and_can_be_forced(qwen2_5) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [decode_mode("auto", device) for device in (cpu, gpu)] == ["native", "graph"]
    assert [decode_mode("static", device) for device in (cpu, gpu)] == ["static", "static"]
    assert decode_mode("eager", gpu) == "eager"
    with pytest.raises(ValueError, match="decode: expected one of auto, eager, native, static, graph, got 'fast'"):
        decode_mode("fast", cpu)
    with pytest.raises(ValueError, match="a graph needs a CUDA device, and the policy is on cpu"):
        Generator(qwen2_5, decode="graph")


# On a GPU


def raise_eos(core: Any, token: int) -> Any:
    """A hook that makes answers end at different steps; its bonus is on the device before any capture."""
    bonus = torch.zeros(
        core.lm_head.weight.shape[0], device=core.lm_head.weight.device, dtype=core.lm_head.weight.dtype
    )
    bonus[token] = 5.0
    return core.lm_head.register_forward_hook(lambda _module, _args, out: out + bonus)


@pytest.mark.gpu
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["eager", "static", "graph"])
def test_gpu_greedy_in_float32_equals_the_cpu(tiny_folder, style: str, mode: str) -> None:
    cpu = load_policy(tiny_folder(style), device="cpu")
    gpu = load_policy(tiny_folder(style), device="cuda", dtype=torch.float32)
    prompts, sampling = encode(cpu), Sampling(1, 48, temperature=0)
    got, want = Generator(gpu, decode=mode).generate(prompts, sampling), Generator(cpu).generate(prompts, sampling)
    assert_same(got, want, 1e-3)


@pytest.mark.gpu
def test_gpu_greedy_in_float32_equals_generate(tiny_folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cuda", dtype=torch.float32)
    prompts = encode(policy)
    out = Generator(policy).generate(prompts, Sampling(1, 24, temperature=0))
    for prompt, (completion,) in zip(prompts, out, strict=True):
        assert completion.token_ids.tolist() == reference_generate(policy, prompt, 24).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_graph_samples_what_static_samples(tiny_folder, small_buckets, dtype: torch.dtype) -> None:
    """The same kernels with the same shapes, launched or replayed; rows retire through several graphs."""
    policy = load_policy(tiny_folder("qwen2_5"), device="cuda", dtype=dtype)
    prompts, sampling = encode(policy), Sampling(8, 64)
    hook = raise_eos(policy.core, policy.eos_token_ids[0])
    static, graph = (Generator(policy, decode=mode).generate(prompts, sampling, rng()) for mode in ("static", "graph"))
    again = Generator(policy).generate(prompts, sampling, rng())
    hook.remove()
    assert same(static, graph)
    assert len({len(c.token_ids) for completions in graph for c in completions}) > 3
    for left, right in zip(graph, again, strict=True):  # one seed gives the same bits
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a.token_ids, b.token_ids)
            assert torch.equal(a.sampler_logp, b.sampler_logp)


@pytest.mark.gpu
def test_gpu_seeds_on_either_device_are_taken(tiny_folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cuda")
    prompts, sampling = encode(policy), Sampling(4, 12)
    for device in ("cpu", "cuda"):
        seeds = [torch.Generator(device).manual_seed(3) for _ in range(2)]
        first, second = (Generator(policy).generate(prompts, sampling, seed) for seed in seeds)
        assert same(first, second)


@pytest.mark.gpu
def test_gpu_graphs_see_an_update_and_their_memory_is_freed(tiny_folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cuda", lora={"rank": 4})
    prompts, sampling = encode(policy), Sampling(8, 40)
    graph = Generator(policy)
    first = graph.generate(prompts, sampling, rng())  # libraries keep their workspaces from here on
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    second = graph.generate(prompts, sampling, rng())
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
    assert not same(first, second)
    assert same(second, Generator(policy, decode="static").generate(prompts, sampling, rng()))
    for prompt, completions in zip(prompts, second, strict=True):
        assert all(c.sampler_logp is not None and c.sampler_logp.isfinite().all() for c in completions), prompt


@pytest.mark.gpu
def test_gpu_sampler_logp_is_the_trainers(tiny_folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cuda", dtype=torch.float32)
    prompts = encode(policy)
    for prompt, completions in zip(prompts, Generator(policy).generate(prompts, Sampling(3, 10), rng()), strict=True):
        for completion in completions:
            assert completion.sampler_logp is not None
            trained = teacher_forced(policy, prompt, completion).cpu()
            torch.testing.assert_close(completion.sampler_logp, trained, rtol=1e-3, atol=1e-3)
