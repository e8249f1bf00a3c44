"""``DecodeStep``: decode steps in C++ against a float64 model, for all sizes, threads and instruction sets."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastrl_kernels import _native, decode_step
from fastrl_kernels.decode_step import Angles, DecodeStep, Draws, Keys, Layer, Linear, Norm, best_level, unfit

REPO = Path(__file__).resolve().parents[2]
LACKS = _native.lacks("fastrl_decode")
pytestmark = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))
LEVELS = range(best_level() + 1)


@dataclass(frozen=True)
class Sizes:
    rows: tuple[int, ...] = (3, 1, 5)  # of each group
    prompts: tuple[int, ...] = (7, 0, 13)
    query_heads: int = 4
    key_heads: int = 2
    dim: int = 16
    hidden: int = 48
    inner: int = 72
    layers: int = 2
    vocabulary: int = 300
    own: int = 6  # keys that fit behind the prompts
    step: int = 2  # of them there before
    biases: bool = False
    head_norms: bool = False


SIZES = {
    "plain": Sizes(),
    "biases": Sizes(biases=True),
    "head norms": Sizes(head_norms=True, dim=32),
    "one of all": Sizes((1,), (1,), 1, 1, 2, 1, 1, 1, 2, 1, 0),
    "no prompt": Sizes((2,), (0,), step=0),
    "odd": Sizes((1, 2, 9), (33, 1, 130), 6, 2, 18, 37, 53, 1, 1025, 5, 3, biases=True, head_norms=True),
    "many heads of one": Sizes((4,), (20,), 20, 1, 8),
    "wide heads": Sizes((9, 2), (40, 3), 2, 2, 128, 64, 40),
    "80 numbers a head": Sizes((6,), (11,), 3, 1, 80),
    "24 numbers a head": Sizes((2, 2), (5, 6), 4, 4, 24, 40, 100),
    "several blocks of rows": Sizes((70, 9, 60), (4, 2, 5), hidden=32, inner=24, layers=1),
}


class Problem:
    """Random weights and keys of these sizes, in float64, rounded to float32 first."""

    def __init__(self, sizes: Sizes) -> None:
        s, self.sizes = sizes, sizes
        queries, keys = s.query_heads * s.dim, s.key_heads * s.dim
        self.size, groups = sum(s.rows), len(s.rows)

        def linear(inputs: int, outputs: int) -> Linear:
            bias = normal(outputs) if s.biases else None
            return Linear(normal(outputs, inputs) / math.sqrt(inputs), bias)

        def norm(size: int) -> Norm:
            return Norm(1 + 0.3 * normal(size), 1e-5)

        self.embedding, self.last = normal(s.vocabulary, s.hidden), norm(s.hidden)
        self.layers = [
            Layer(
                norm(s.hidden), linear(s.hidden, queries), linear(s.hidden, keys), linear(s.hidden, keys),
                linear(queries, s.hidden), norm(s.hidden), linear(s.hidden, s.inner), linear(s.hidden, s.inner),
                linear(s.inner, s.hidden), s.dim**-0.5, norm(s.dim) if s.head_norms else None,
                norm(s.dim) if s.head_norms else None,
            )
            for _ in range(s.layers)
        ]  # fmt: skip
        shapes = ((groups, s.key_heads, max(s.prompts), s.dim), (self.size, s.key_heads, s.own, s.dim))
        prompt_keys, prompt_values, own_keys, own_values = (
            [normal(*shape) for _ in range(s.layers)] for shape in (*shapes[:1] * 2, *shapes[1:] * 2)
        )
        offsets = torch.tensor([0, *s.rows]).cumsum(0).to(torch.int32)
        lengths = torch.tensor(s.prompts, dtype=torch.int32)
        self.keys = Keys(prompt_keys, prompt_values, own_keys, own_values, offsets, lengths, s.step)
        angle = torch.rand(self.size * s.own, s.dim // 2) * 6
        self.angles = Angles(angle.cos(), angle.sin(), torch.arange(self.size) * s.own)
        self.token = torch.randint(0, s.vocabulary, (self.size,))
        self.head = linear(s.hidden, s.vocabulary)
        self.group = torch.repeat_interleave(torch.arange(groups), torch.tensor(s.rows)).tolist()

    def step(self, **options: Any) -> DecodeStep:
        s = self.sizes
        return DecodeStep(
            self.embedding, self.layers, self.last, query_heads=s.query_heads, key_heads=s.key_heads, **options
        )

    def copied(self) -> Keys:
        """The keys, with own ones that a step may write to."""
        own = ([x.clone() for x in buffers] for buffers in (self.keys.own_keys, self.keys.own_values))
        return self.keys._replace(**dict(zip(("own_keys", "own_values"), own, strict=True)))

    def truth(self, token: Tensor, keys: Keys, line: Tensor) -> Tensor:
        """Hidden states [R, H] in float64, attention row by row; appends to ``keys`` (of float64), as a step does."""
        x = self.embedding[token].double()
        cos, sin = (table[line, None].double() for table in (self.angles.cos, self.angles.sin))
        for i, layer in enumerate(self.layers):
            x = x + self._attention(layer, i, normed(x, layer.before_attention), cos, sin, keys)
            h = normed(x, layer.before_gate)
            gate, up = times(h, layer.gate), times(h, layer.up)
            x = x + times(gate / (1 + (-gate).exp()) * up, layer.down)
        return normed(x, self.last)

    def _attention(self, layer: Layer, i: int, h: Tensor, cos: Tensor, sin: Tensor, keys: Keys) -> Tensor:
        s, step = self.sizes, keys.step + 1
        q, k, v = (times(h, part).view(self.size, -1, s.dim) for part in (layer.query, layer.key, layer.value))
        q = turned(q if layer.query_norm is None else normed(q, layer.query_norm), cos, sin)
        k = turned(k if layer.key_norm is None else normed(k, layer.key_norm), cos, sin)
        keys.own_keys[i][:, :, keys.step], keys.own_values[i][:, :, keys.step] = k, v
        out = []
        for r, group in enumerate(self.group):
            seen, held = (
                torch.cat([prompt[i][group, :, : s.prompts[group]].double(), own[i][r, :, :step]], 1).repeat_interleave(
                    s.query_heads // s.key_heads, 0
                )
                for prompt, own in ((keys.prompt_keys, keys.own_keys), (keys.prompt_values, keys.own_values))
            )  # [Hq, keys, D]
            weight = torch.softmax(seen @ q[r, :, :, None] * layer.scale, 1)
            out.append((weight * held).sum(1).flatten())
        return times(torch.stack(out), layer.output)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def times(x: Tensor, linear: Linear) -> Tensor:
    out = x @ linear.weight.double().T
    return out if linear.bias is None else out + linear.bias.double()


def normed(x: Tensor, norm: Norm) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def wide(keys: Keys) -> Keys:
    own = {name: [x.double() for x in getattr(keys, name)] for name in ("own_keys", "own_values")}
    return keys._replace(**own)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SIZES)
def test_hidden_states_and_new_keys_are_those_of_float64(name: str, level: int) -> None:
    problem = Problem(SIZES[name])
    keys = problem.copied()
    line = problem.angles.line + problem.sizes.step
    got = problem.step(level=level).hidden(problem.token, keys, problem.angles._replace(line=line))
    truth_keys = wide(problem.keys)
    want = problem.truth(problem.token, truth_keys, line)
    assert float((got - want).norm() / want.norm()) < 2e-6
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    got_keys, want_keys = ([*x.own_keys, *x.own_values] for x in (keys, truth_keys))
    for mine, true in zip(got_keys, want_keys, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "several blocks of rows"])
def test_no_bit_depends_on_threads(name: str) -> None:
    problem = Problem(SIZES[name])
    outs = []
    for count in (1, 2, 5):
        with threads(count):
            outs.append(problem.step().hidden(problem.token, problem.copied(), problem.angles))
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("level", LEVELS)
def test_no_bit_of_a_row_depends_on_the_rows_beside_it(level: int) -> None:
    problem = Problem(replace(SIZES["odd"], rows=(9,), prompts=(33,)))
    step = problem.step(level=level)
    whole = step.hidden(problem.token, problem.copied(), problem.angles)
    for size in (1, 2, 3, 6, 7):
        own = {name: [x[:size].clone() for x in getattr(problem.keys, name)] for name in ("own_keys", "own_values")}
        keys = problem.keys._replace(row_offsets=torch.tensor([0, size], dtype=torch.int32), **own)
        angles = problem.angles._replace(line=problem.angles.line[:size])
        assert torch.equal(step.hidden(problem.token[:size].clone(), keys, angles), whole[:size])


def test_weights_may_be_views_with_lines_apart() -> None:
    problem = Problem(SIZES["biases"])
    want = problem.step().hidden(problem.token, problem.copied(), problem.angles)
    for i, layer in enumerate(problem.layers):
        stacked = torch.cat([layer.gate.weight, layer.up.weight])
        apart = torch.cat([layer.down.weight, normal(problem.sizes.hidden, 5)], 1)[:, : problem.sizes.inner]
        gate, up = stacked.chunk(2)
        changes = {"gate": gate, "up": up, "down": apart}
        problem.layers[i] = layer._replace(**{k: getattr(layer, k)._replace(weight=w) for k, w in changes.items()})
    assert torch.equal(problem.step().hidden(problem.token, problem.copied(), problem.angles), want)


# Drawing


def draws_of(problem: Problem, columns: int = 5, **changes: Any) -> Draws:
    size = problem.size
    plain = Draws(
        head=problem.head,
        temperature=1.0,
        suppressed=torch.empty(0, dtype=torch.int64),
        ends=torch.empty(0, dtype=torch.int64),
        uniform=torch.rand(size + 2, columns, dtype=torch.float64),
        tokens=torch.full((size + 2, columns), -1),
        logp=torch.full((size + 2, columns), 9.0),
        line=torch.randperm(size + 2)[:size],
        column=1,
        alive=torch.ones(size, dtype=torch.bool),
        stop_at=0,
    )
    return plain._replace(**changes)


def expected(problem: Problem, draws: Draws, steps: int) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs [R, steps] by float64, each step fed the token that the one before drew."""
    keys, token, line = wide(problem.keys), problem.token, problem.angles.line
    tokens, logps = [], []
    for t in range(steps):
        logits = times(problem.truth(token, keys, line + t), draws.head)
        keys = keys._replace(step=keys.step + 1)
        scores = logits / (draws.temperature or 1.0)
        logp = scores.log_softmax(-1)
        allowed = scores.index_fill(-1, draws.suppressed, -torch.inf).softmax(-1)
        if draws.uniform is None:
            token = allowed.argmax(-1)
        else:
            point = draws.uniform[draws.line, draws.column + t, None] * allowed.sum(-1, keepdim=True)
            token = torch.searchsorted(allowed.cumsum(-1), point, right=True)[:, 0]
        tokens.append(token)
        logps.append(logp.gather(-1, token[:, None])[:, 0])
    return torch.stack(tokens, 1), torch.stack(logps, 1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("vocabulary", "temperature"), [(7, 0.0), (7, 0.6), (1024, 1.0), (1025, 1.7), (2560, 1.0), (2560, 0.0)]
)
def test_tokens_and_log_probs_are_those_of_float64(vocabulary: int, temperature: float, level: int) -> None:
    """Several steps in one call; small vocabularies and those drawn from in two steps; some tokens suppressed."""
    problem = Problem(Sizes(vocabulary=vocabulary, step=0))
    suppressed = torch.tensor([0, vocabulary - 1, 3])
    draws = draws_of(problem, temperature=temperature, suppressed=suppressed)
    if temperature == 0:
        draws = draws._replace(uniform=None)
    token = problem.token.clone()
    keys = problem.copied()
    assert problem.step(level=level).draw(token, keys, problem.angles, draws, 4) == 4
    tokens, logp = expected(problem, draws, 4)
    assert torch.equal(draws.tokens[draws.line, 1:], tokens)
    assert torch.equal(token, tokens[:, -1])
    torch.testing.assert_close(draws.logp[draws.line, 1:].double(), logp, rtol=1e-5, atol=1e-5)
    untouched = torch.ones(len(draws.tokens), dtype=torch.bool).index_fill(0, draws.line, False)
    assert (draws.tokens[:, 0] == -1).all()
    assert (draws.tokens[untouched] == -1).all()
    assert (draws.logp[untouched] == 9.0).all()


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    """All rows alike, 4,000 numbers: frequencies within four standard deviations, suppressed tokens never."""
    problem = Problem(Sizes((4000,), (3,), hidden=16, inner=16, layers=1, vocabulary=12, dim=8, own=1, step=0))
    problem.token = torch.zeros(problem.size, dtype=torch.int64)
    angle = torch.ones(1, 4)
    angles = Angles(angle.cos(), angle.sin(), torch.zeros(problem.size, dtype=torch.int64))
    draws = draws_of(problem, suppressed=torch.tensor([5]))
    problem.step().draw(problem.token.clone(), problem.copied(), angles, draws, 1)
    hidden = problem.step().hidden(problem.token, problem.copied(), angles)[0]
    chance = times(hidden.double(), problem.head).index_fill(-1, torch.tensor([5]), -torch.inf).softmax(-1)
    seen = torch.bincount(draws.tokens[draws.line, 1], minlength=12) / problem.size
    spread = (chance * (1 - chance) / problem.size).sqrt()
    assert seen[5] == 0
    assert ((seen - chance).abs() <= 4 * spread + 1e-9).all()


def test_a_call_returns_when_enough_rows_have_ended() -> None:
    problem = Problem(Sizes(vocabulary=4, own=40, step=0))
    draws = draws_of(problem, 41, ends=torch.tensor([1, 3]), stop_at=2)
    done = problem.step().draw(problem.token.clone(), problem.copied(), problem.angles, draws, 39)
    drawn = draws.tokens[draws.line, 1 : 1 + done]
    ended = ((drawn == 1) | (drawn == 3)).cumsum(1) > 0
    alive = (~ended).sum(0)
    assert done < 39, "half the tokens end a row"
    assert int(alive[-1]) <= 2
    assert (alive[:-1] > 2).all()
    assert torch.equal(draws.alive, ~ended[:, -1])
    assert (draws.tokens[:, 1 + done :] == -1).all()


@pytest.mark.parametrize("vocabulary", [40, 2000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_diverged_weights_give_nan_log_probs_and_tokens_of_the_vocabulary(vocabulary: int, temperature: float) -> None:
    problem = Problem(Sizes(vocabulary=vocabulary, step=0))
    problem.layers[0].down.weight[3, 2] = torch.nan
    draws = draws_of(problem, temperature=temperature)
    assert problem.step().draw(problem.token.clone(), problem.copied(), problem.angles, draws, 3) == 3
    assert draws.logp[draws.line, 1:4].isnan().all()
    tokens = draws.tokens[draws.line, 1:4]
    assert ((tokens >= 0) & (tokens < vocabulary)).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 1e30])
def test_infinite_logits_do_not_pass_for_finite(value: float) -> None:
    problem = Problem(Sizes(biases=True, step=0))
    bias = torch.zeros(problem.sizes.vocabulary).index_fill_(0, torch.tensor([4]), value)
    problem.head = problem.head._replace(bias=bias)
    draws = draws_of(problem)
    problem.step().draw(problem.token.clone(), problem.copied(), problem.angles, draws, 1)
    token, logp = draws.tokens[draws.line, 1], draws.logp[draws.line, 1]
    if value == torch.inf:
        assert logp.isnan().all()
    else:
        assert (token == 4).all() if value > 0 else (token != 4).all()
        assert logp.isfinite().all()


# What is refused


def bad_calls() -> dict[str, Any]:
    def keys(**changes: Any) -> Any:
        return lambda p: {"keys": p.copied()._replace(**changes)}

    def ints(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    return {
        r"own_keys\[0\]: expected shape \[8, 2, 6, 16\]": lambda p: {"token": p.token[:-1]},
        "token: expected dtype": lambda p: {"token": p.token.int()},
        "lies outside its table": lambda p: {"token": p.token.index_fill(0, torch.tensor([2]), p.sizes.vocabulary)},
        "tokens 0 to 299": lambda p: {"token": p.token.index_fill(0, torch.tensor([2]), -1)},
        "row_offsets rising": keys(row_offsets=ints(0, 4, 3, 9)),
        "from 0 to 9": keys(row_offsets=ints(0, 3, 4, 8)),
        "rising from 0": keys(row_offsets=ints(1, 3, 4, 9)),
        "prompt_len 0 to 13": keys(prompt_len=ints(7, 0, 14)),
        "decode step: a token, length": keys(prompt_len=ints(7, -1, 13)),
        "row_offsets: expected shape": keys(row_offsets=ints(0, 9)),
        "prompt_len: expected dtype": keys(prompt_len=torch.tensor([7, 0, 13])),
        "do not fit behind 6 of 6": keys(step=6),
        "angles 0 to": lambda p: {"angles": p.angles._replace(line=p.angles.line + 1 + p.sizes.own)},
        "sin: expected shape": lambda p: {"angles": p.angles._replace(sin=p.angles.sin[:-1])},
        "cos: expected shape": lambda p: {"angles": p.angles._replace(cos=p.angles.cos[:, :-1])},
        "expected 2 layers": lambda p: {"keys": p.copied()._replace(own_keys=p.keys.own_keys[:1])},
        r"own_values\[1\]: expected a contiguous": lambda p: {
            "keys": p.copied()._replace(own_values=[p.keys.own_values[0], p.keys.own_values[1].mT.contiguous().mT])
        },
        r"prompt_keys\[0\]: expected dtype": lambda p: {
            "keys": p.copied()._replace(prompt_keys=[x.double() for x in p.keys.prompt_keys])
        },
    }  # fmt: skip


@pytest.mark.parametrize("message", bad_calls())
def test_a_call_that_does_not_fit_is_refused_before_anything_is_written(message: str) -> None:
    problem = Problem(SIZES["plain"])
    keys = problem.copied()
    arguments = {"token": problem.token, "keys": keys, "angles": problem.angles} | bad_calls()[message](problem)
    with pytest.raises((ValueError, TypeError), match=message):
        problem.step().hidden(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(keys.own_keys, problem.keys.own_keys, strict=True))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("uniform: needed", {"uniform": None}),
        ("temperature: expected 0 or more", {"temperature": -1.0}),
        ("tokens: expected dtype", {"tokens": torch.zeros(11, 5, dtype=torch.int32)}),
        ("logp: expected shape", {"logp": torch.zeros(11, 4)}),
        ("alive: expected shape", {"alive": torch.ones(1, dtype=torch.bool)}),
        ("column: 3 steps from 3", {"column": 3}),
        ("outside its table", {"suppressed": torch.tensor([300])}),
        ("outside its table", {"line": torch.arange(9) + 3}),
        ("head: expected a float32 weight", {"head": Linear(torch.zeros(300, 48, dtype=torch.float64))}),
        ("head: expected a float32 weight", {"head": Linear(torch.zeros(301, 48))}),
    ],
)
def test_draws_that_do_not_fit_are_refused(message: str, changes: dict[str, Any]) -> None:
    problem = Problem(replace(SIZES["plain"], step=0))
    with pytest.raises((ValueError, TypeError), match=message):
        problem.step().draw(problem.token, problem.copied(), problem.angles, draws_of(problem, **changes), 3)


def linear_with(weight: Tensor, bias: Tensor | None = None) -> Any:
    return lambda layer: layer._replace(up=Linear(weight, bias))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"layers\[1\]: up: expected a float32 matrix", linear_with(torch.zeros(72, 48, dtype=torch.float64))),
        (r"layers\[1\]: up: expected a float32 matrix", linear_with(torch.zeros(72, 48, device="meta"))),
        (r"layers\[1\]: up: expected a float32 matrix", linear_with(torch.zeros(48, 72).T)),
        (r"layers\[1\]: up: expected a float32 matrix", linear_with(torch.zeros(0))),
        (r"layers\[1\]: up: expected a weight \[72, 48\], got \[72, 40\]", linear_with(torch.zeros(72, 40))),
        (r"layers\[1\]: up: expected a contiguous float32 bias", linear_with(torch.zeros(72, 48), torch.zeros(71))),
        (r"before_gate: expected", lambda layer: layer._replace(before_gate=Norm(torch.zeros(47), 1e-6))),
        (r"key_norm: expected", lambda layer: layer._replace(key_norm=Norm(torch.zeros(8), 1e-6))),
    ],
)
def test_weights_of_another_kind_are_not_taken(message: str, change: Any) -> None:
    problem = Problem(SIZES["plain"])
    problem.layers[1] = change(problem.layers[1])
    with pytest.raises(ValueError, match=f"decode step: .*{message}"):
        problem.step()


def reason(problem: Problem) -> str | None:
    return unfit(problem.embedding, problem.layers, problem.last, query_heads=4, key_heads=2)


def test_where_operators_are_watched_autocast_is_on_or_kernels_interpreted_the_eager_path_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = Problem(SIZES["plain"])
    assert reason(problem) is None
    with FlopCounterMode(display=False):
        assert "watched" in str(reason(problem))
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(reason(problem))
    assert "heads" in str(unfit(problem.embedding, problem.layers, problem.last, query_heads=3, key_heads=2))
    assert "layers" in str(unfit(problem.embedding, [], problem.last, query_heads=4, key_heads=2))
    monkeypatch.setattr(decode_step, "interpreting", lambda: True)
    assert "interpreter" in str(reason(problem))
    monkeypatch.undo()
    monkeypatch.setattr(_native, "library", lambda: object())  # one built before there was a decode step
    assert "built without fastrl_decode: rebuild it" in str(reason(problem))
    assert best_level() == 0
    monkeypatch.setattr(_native, "library", lambda: None)
    monkeypatch.setattr(_native, "why_not", lambda: "not built")
    assert reason(problem) == "not built"
    assert best_level() == 0


def test_without_torchs_threads_one_thread_is_enough_and_several_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(SIZES["plain"])
    want = problem.step().hidden(problem.token, problem.copied(), problem.angles)
    monkeypatch.setattr(_native, "parallel", lambda: None)
    with threads(2):
        assert "GOMP_parallel" in str(reason(problem))
    with threads(1):
        assert torch.equal(problem.step().hidden(problem.token, problem.copied(), problem.angles), want)


def test_a_level_that_the_machine_has_not_is_refused() -> None:
    problem = Problem(SIZES["plain"])
    with pytest.raises(ValueError, match="level: expected 0 to"):
        problem.step(level=best_level() + 1)


# Memory


@pytest.mark.gate
def test_no_byte_outside_a_buffer_is_touched(tmp_path: Path) -> None:
    """This file once more, with the library built by a compiler that watches every access."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    package = tmp_path / "fastrl_kernels"
    shutil.copytree(REPO / "kernels" / "fastrl_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    watch = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-omit-frame-pointer", "-O1"]
    flags = ["-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"]
    include = f"-I{sysconfig.get_paths()['include']}"
    sources = sorted(map(str, (REPO / "csrc").glob("*.cpp")))
    command = [compiler, *watch, *flags, include, "-shared", *sources, "-o", str(package / "_C.abi3.so")]
    subprocess.run(command, check=True, timeout=1200)
    script = (
        "import sys, pytest\n"
        "from fastrl_kernels import _native\n"
        f"assert _native.library()._name.startswith({str(tmp_path)!r}), _native.library() or _native.why_not()\n"
        f"sys.exit(pytest.main([{__file__!r}, '-q', '-x', '-p', 'no:cacheprovider', '-m', 'not gate']))\n"
    )
    watched = {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)]), "UBSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, env=os.environ | watched | path, capture_output=True, text=True,
        timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
