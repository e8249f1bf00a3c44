"""Rollouts on a server with vLLM's API, and on one that fails in many ways."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.models.load import load_policy
from fastrl.recipe import RecipeError
from fastrl.rollout import Generator, RolloutError, Sampling, VllmGenerator
from fastrl.run.logs import read_rows
from fastrl.trainer import TrainingError, train
from tests.helpers.disk import file_size_limit
from tests.helpers.rollouts import encode, make_records, rng, same, teacher_forced
from tests.helpers.training import make_recipe, steady_rows
from tests.helpers.training import make_records as ocr_records
from tests.helpers.vllm_server import Act, Handler, VllmServer

GREEDY = Sampling(2, 8, temperature=0)
# peft warns of a renamed property in newer transformers when the server loads an adapter
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def server(tiny_folder: Callable[[str], Path]) -> Iterator[VllmServer]:
    served = VllmServer(tiny_folder("qwen2_5"))
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def policy(tiny_folder: Callable[[str], Path]) -> Any:
    return load_policy(tiny_folder("qwen2_5"))


@pytest.fixture
def adapted(tiny_folder: Callable[[str], Path]) -> Any:
    return load_policy(tiny_folder("qwen2_5"), lora={"rank": 4})


def disturb(policy: Any, seed: int = 0) -> None:
    """Other weights, as after an update."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.core.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)


class Remote(VllmGenerator):
    """With a number of updates that the test sets, and pauses that are recorded instead of waited for."""

    def __init__(self, policy: Any, server: VllmServer, folder: Path, **options: Any) -> None:
        self.made, self.pauses = 0, list[float]()
        given: dict[str, Any] = {"retries": 2, "sleep": self.pauses.append, "timeout": 60.0, **options}
        super().__init__(policy, server.url + "/v1", folder=folder, updates=lambda: self.made, **given)


def status(code: int) -> Act:
    def act(h: Handler, body: dict[str, Any]) -> bool:
        h.reply(code, "went wrong")
        return True

    return act


def well(h: Handler, body: dict[str, Any]) -> bool:
    return False


def hang_up(h: Handler, body: dict[str, Any]) -> bool:
    h.close_connection = True
    return True


def cut(h: Handler, body: dict[str, Any]) -> bool:
    h.send_response(200)
    h.send_header("Content-Length", "500")
    h.end_headers()
    h.wfile.write(b'{"choices"')
    return True


def slow(h: Handler, body: dict[str, Any]) -> bool:
    h.connection.settimeout(60)
    h.connection.recv(1)  # returns when the client has given up
    return hang_up(h, body)


def restarted(h: Handler, body: dict[str, Any]) -> bool:
    h.server.restart()
    return hang_up(h, body)


def test_a_picture_comes_back_from_its_patches(policy: Any) -> None:
    for record in make_records():
        for source in record.images:
            image, _ = policy.preprocessor(source)
            again, _ = policy.preprocessor(policy.preprocessor.picture(image))
            assert torch.equal(again.pixel_values, image.pixel_values)


@pytest.mark.parametrize("kind", ["policy", "adapted"])
def test_answers_are_those_of_the_present_weights(
    kind: str, request: pytest.FixtureRequest, server: VllmServer, tmp_path: Path
) -> None:
    """Greedy answers are the local generator's, log-probs the trainer's, before and after an update."""
    policy = request.getfixturevalue(kind)
    remote, prompts = Remote(policy, server, tmp_path), encode(policy)
    for updates in range(3):
        remote.made = updates
        got, want = remote.generate(prompts, GREEDY), Generator(policy).generate(prompts, GREEDY)
        assert same(got, want)
        assert [[c.text for c in row] for row in got] == [[c.text for c in row] for row in want]
        for prompt, completions in zip(prompts, got, strict=True):
            assert completions[0].sampler_logp is not completions[1].sampler_logp
            torch.testing.assert_close(
                completions[0].sampler_logp, teacher_forced(policy, prompt, completions[0]), atol=1e-4, rtol=0
            )
        disturb(policy, updates)
    assert len(list(tmp_path.iterdir())) == 1  # one version of the weights at a time
    remote.close()
    assert not list(tmp_path.iterdir())
    assert not server.adapters


def test_sampled_answers_follow_the_seed_and_the_request_says_everything(
    policy: Any, server: VllmServer, tmp_path: Path
) -> None:
    remote, prompts = Remote(policy, server, tmp_path), encode(policy)
    sampling = Sampling(3, 6)
    first, second, other = (remote.generate(prompts, sampling, rng(seed)) for seed in (0, 0, 1))
    assert same(first, second)
    assert not same(first, other)
    assert [len(row) for row in first] == [3] * len(prompts)
    assert len(server.asked("/collective_rpc")) == 1  # the same weights are pushed once
    sent = server.asked("/v1/chat/completions")[-1]
    assert sent["stop_token_ids"] == list(policy.eos_token_ids)
    assert sent["ignore_eos"]
    assert sent["logit_bias"] == {str(token): -100.0 for token in policy.suppressed_token_ids}
    assert (sent["repetition_penalty"], sent["min_p"], sent["top_p"], sent["top_k"]) == (1.0, 0.0, 1.0, 0)
    assert sent["return_token_ids"]
    assert sent["logprobs"]
    assert sent["cache_salt"]


@pytest.mark.parametrize("kind", ["policy", "adapted"])
@pytest.mark.parametrize("trouble", [status(500), status(429), cut, hang_up], ids=["500", "429", "cut", "hang up"])
def test_trouble_that_passes_costs_a_retry(
    trouble: Act, kind: str, request: pytest.FixtureRequest, server: VllmServer, tmp_path: Path
) -> None:
    policy = request.getfixturevalue(kind)
    disturb(policy)
    prompts, pauses = encode(policy)[:2], []
    pushing = 2 if kind == "adapted" else 4  # /v1/models, then the adapter or pause, load, resume
    for place in (0, pushing - 1, pushing, pushing + 1):  # the first call, the last of a push, the probe, an answer
        remote = Remote(policy, server, tmp_path)
        server.script = [well] * place + [trouble]
        assert same(remote.generate(prompts, GREEDY), Generator(policy).generate(prompts, GREEDY)), place
        pauses += remote.pauses
    assert pauses == [1.0] * 4


@pytest.mark.parametrize("kind", ["policy", "adapted"])
def test_a_frozen_server_is_waited_for_once(
    kind: str, request: pytest.FixtureRequest, server: VllmServer, tmp_path: Path
) -> None:
    """A run waits ``server_timeout`` seconds; the error names the server."""
    policy = request.getfixturevalue(kind)
    answers = 3 if kind == "adapted" else 5
    for place, timeout in ((0, 0.5), (answers, 3.0)):
        remote = Remote(policy, server, tmp_path, timeout=timeout)
        server.script = [well] * place + [slow]
        with pytest.raises(RolloutError, match=f"waited for .* {server.url}: .*within {timeout:g} seconds"):
            remote.generate(encode(policy)[:1], GREEDY)
        assert remote.pauses == []


@pytest.mark.parametrize("kind", ["policy", "adapted"])
def test_a_server_that_was_started_again_never_answers_with_other_weights(
    kind: str, request: pytest.FixtureRequest, server: VllmServer, tmp_path: Path
) -> None:
    """Weights are pushed again, and the requests repeated."""
    policy = request.getfixturevalue(kind)
    disturb(policy)
    remote, prompts = Remote(policy, server, tmp_path, concurrency=1), encode(policy)[:3]
    remote.generate(prompts, GREEDY)
    server.script = [well, restarted]
    assert same(remote.generate(prompts, GREEDY), Generator(policy).generate(prompts, GREEDY))
    assert len(server.asked("/collective_rpc" if kind == "policy" else "/v1/load_lora_adapter")) == 2


@pytest.mark.parametrize(
    ("kind", "place", "code", "message"),
    [
        ("policy", 0, 404, "no vLLM server at"),
        ("policy", 1, 404, "after 7 updates.*refused: HTTP 404.*VLLM_SERVER_DEV_MODE=1"),
        ("policy", 2, 500, "did not answer, tried once; last: pushing the weights after 7 updates: HTTP 500"),
        ("adapted", 1, 400, "after 7 updates.*refused: HTTP 400.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ("adapted", 1, 500, "did not answer, tried once; last: pushing the weights after 7 updates: HTTP 500"),
    ],
)
def test_weights_that_were_not_taken_are_an_error_and_nothing_is_asked(
    kind: str,
    place: int,
    code: int,
    message: str,
    request: pytest.FixtureRequest,
    server: VllmServer,
    tmp_path: Path,
) -> None:
    policy = request.getfixturevalue(kind)
    remote = Remote(policy, server, tmp_path, retries=0)
    remote.made = 7
    server.script = [well] * place + [status(code)]
    with pytest.raises(RolloutError, match=message):
        remote.generate(encode(policy)[:1], GREEDY)
    assert not server.asked("/v1/chat/completions")
    assert not list(tmp_path.iterdir())
    assert server.paused == (kind == "policy" and place == 2)  # partially loaded weights are not used for answers


@pytest.mark.parametrize("kind", ["policy", "adapted"])
def test_weights_that_cannot_be_written_are_one_line(
    kind: str, request: pytest.FixtureRequest, server: VllmServer, tmp_path: Path
) -> None:
    remote = Remote(request.getfixturevalue(kind), server, tmp_path / "shared", retries=0)
    with (
        file_size_limit(1000),
        pytest.raises(RolloutError, match=r"the weights for the server cannot be written: .*\(needs [\d,]+ bytes, "),
    ):
        remote.generate(encode(remote.policy)[:1], GREEDY)
    assert not list((tmp_path / "shared").iterdir())


def wrong_prompt(reply: dict[str, Any]) -> None:
    reply["prompt_token_ids"] = [*reply["prompt_token_ids"][:5], 7, 7, *reply["prompt_token_ids"][5:]]


def first_choice(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply["choices"][0].update(changes)


def logprobs(*values: float) -> dict[str, Any]:
    return {"content": [{"token": "x", "logprob": value} for value in values]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_prompt, r"serves tiny\) reads a prompt as \d+ tokens.*From token 5 on, the server.*this policy"),
        (lambda reply: reply.pop("prompt_token_ids"), "returns no token ids"),
        (lambda reply: reply.update(model="old"), "answered with 'old', not with the requested weights, 'tiny'"),
        (lambda reply: reply["choices"].pop(), "gave 1 answers where 2 were requested"),
        (first_choice(token_ids=[65], logprobs=logprobs(-1.0)), "ends after 1 tokens without an end of turn"),
        (first_choice(token_ids=[65] * 9, logprobs=logprobs(*[-1.0] * 9)), "or after max_new_tokens"),
        (first_choice(logprobs=logprobs(-1.0)), "last: an answer without a log-prob for each"),
        (first_choice(token_ids=None), "last: an answer without a log-prob for each"),
        (first_choice(finish_reason="abort"), "last: the server gave up an answer midway"),
        (lambda reply: reply.pop("choices"), "last: a response that is not a chat completion"),
    ],
)
def test_replies_that_cannot_be_trained_on_are_refused(
    change: Callable[[dict[str, Any]], object], message: str, policy: Any, server: VllmServer, tmp_path: Path
) -> None:
    server.change = change
    with pytest.raises(RolloutError, match=message):
        Remote(policy, server, tmp_path, retries=1).generate(encode(policy)[:1], Sampling(2, 8), rng())


@pytest.mark.parametrize("what", ["end", "suppressed", "infinite"])
def test_tokens_and_log_probs_are_checked(what: str, policy: Any, server: VllmServer, tmp_path: Path) -> None:
    end, image = policy.eos_token_ids[0], policy.suppressed_token_ids[0]
    ids = {"end": [end, 65, end], "suppressed": [65, image, end], "infinite": [65, 66, end]}[what]
    value = -9999.0 if what == "infinite" else -1.0
    server.change = first_choice(token_ids=ids, logprobs=logprobs(*[value] * 3))
    message = {
        "end": "after its end of turn",
        "suppressed": "tokens that logit_bias forbids",
        "infinite": "not finite",
    }[what]
    with pytest.raises(RolloutError, match=message):
        Remote(policy, server, tmp_path).generate(encode(policy)[:1], Sampling(2, 8), rng())


@pytest.mark.parametrize(("temperature", "needed"), [(1.0, "raw"), (0.7, "processed")])
def test_log_probs_must_be_of_the_kind_the_temperature_needs(
    temperature: float, needed: str, policy: Any, server: VllmServer, tmp_path: Path
) -> None:
    remote, prompts = Remote(policy, server, tmp_path), encode(policy)[:1]
    server.mode = "raw_logprobs" if needed == "processed" else "processed_logprobs"
    with pytest.raises(RolloutError, match=f"--logprobs-mode {needed}_logprobs"):
        remote.generate(prompts, Sampling(2, 4, temperature), rng())
    server.mode = f"{needed}_logprobs"
    assert len(remote.generate(prompts, Sampling(2, 4, temperature), rng())[0]) == 2


@pytest.fixture
def second(tiny_folder: Callable[[str], Path]) -> Iterator[VllmServer]:
    served = VllmServer(tiny_folder("qwen2_5"))
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


class Several(VllmGenerator):
    """With a number of updates that the test sets, and no pauses."""

    def __init__(self, policy: Any, servers: list[VllmServer], folder: Path, **options: Any) -> None:
        self.made = 0
        given: dict[str, Any] = {"retries": 2, "sleep": lambda _: None, "timeout": 60.0, **options}
        super().__init__(policy, [s.url for s in servers], folder=folder, updates=lambda: self.made, **given)


@pytest.mark.parametrize("kind", ["policy", "adapted"])
def test_several_servers_share_the_prompts_and_have_the_same_weights(
    kind: str, request: pytest.FixtureRequest, server: VllmServer, second: VllmServer, tmp_path: Path
) -> None:
    policy = request.getfixturevalue(kind)
    disturb(policy)
    remote, prompts = Several(policy, [server, second], tmp_path), encode(policy) * 2
    got = remote.generate(prompts, GREEDY)
    assert same(got, Generator(policy).generate(prompts, GREEDY))
    shares = [len(each.asked("/v1/chat/completions")) - 1 for each in (server, second)]  # without the probe
    assert sum(shares) == len(prompts)
    assert min(shares) >= len(prompts) // 4
    assert {row[0].sampler for row in got} == {server.url, second.url}
    assert remote.notes == []
    remote.close()
    assert not server.adapters
    assert not second.adapters


@pytest.mark.gate
@pytest.mark.parametrize("kind", ["policy", "adapted"])
def test_one_dead_server_of_two_costs_its_share(
    kind: str, request: pytest.FixtureRequest, server: VllmServer, second: VllmServer, tmp_path: Path
) -> None:
    """It is gone when weights are pushed, or hangs up on requests from some moment on."""
    policy = request.getfixturevalue(kind)
    remote, prompts = Several(policy, [server, second], tmp_path), encode(policy)
    loads = 2 if kind == "adapted" else 4
    second.script = [well] * loads + [hang_up] * 100
    expected = Generator(policy).generate(prompts, GREEDY)
    assert same(remote.generate(prompts, GREEDY), expected)
    assert len(remote.notes) == 1
    assert second.url in remote.notes[0]
    second.script = [hang_up] * 100
    remote.notes.clear()
    remote.made = 1
    disturb(policy)
    expected = Generator(policy).generate(prompts, GREEDY)
    assert same(remote.generate(prompts, GREEDY), expected)
    assert remote.notes == []  # said already
    second.script = []
    second.restart()
    got = remote.generate(prompts, GREEDY)
    assert same(got, expected)
    assert {row[0].sampler for row in got} == {server.url, second.url}
    assert remote.notes == [f"the vLLM server at {second.url} has the weights again"]


@pytest.mark.parametrize("kind", ["policy", "adapted"])
def test_one_server_of_two_is_started_again_between_answers(
    kind: str, request: pytest.FixtureRequest, server: VllmServer, second: VllmServer, tmp_path: Path
) -> None:
    policy = request.getfixturevalue(kind)
    disturb(policy)
    remote, prompts = Several(policy, [server, second], tmp_path, concurrency=1), encode(policy)
    remote.generate(prompts, GREEDY)
    second.script = [well, restarted]
    expected = Generator(policy).generate(prompts, GREEDY)
    for _ in range(2):  # an adapter is missed at the next request that names it
        assert same(remote.generate(prompts, GREEDY), expected)
    assert len(second.asked("/collective_rpc" if kind == "policy" else "/v1/load_lora_adapter")) == 2


@pytest.mark.gate
def test_a_frozen_server_of_two_is_waited_for_once_and_both_end_the_run(
    policy: Any, server: VllmServer, second: VllmServer, tmp_path: Path
) -> None:
    remote, prompts = Several(policy, [server, second], tmp_path, timeout=3.0), encode(policy)[:2]
    second.script = [well] * 5 + [slow]
    expected = Generator(policy).generate(prompts, GREEDY)
    assert same(remote.generate(prompts, GREEDY), expected)
    assert "within 3 seconds; not used again" in remote.notes[0]
    calls = len(second.calls)
    remote.made = 1
    assert same(remote.generate(prompts, GREEDY), expected)
    assert len(second.calls) == calls
    server.script = [slow]
    remote.made = 2
    with pytest.raises(RolloutError, match=f"waited for the vLLM servers at {server.url}, {second.url}"):
        remote.generate(prompts, GREEDY)


def test_other_image_limits_are_noticed(policy: Any, server: VllmServer, tmp_path: Path) -> None:
    server.base.image_processor.size = {"shortest_edge": 112 * 112, "longest_edge": 112 * 112}
    keep = server.base.image_processor.size
    remote, prompts = Remote(policy, server, tmp_path), encode(policy)[:1]
    remote.sync()
    server.base.image_processor.size = keep
    with pytest.raises(
        RolloutError,
        match="reads a prompt as 103 tokens, 20 of images; this policy reads it as 89 tokens, 6",
    ):
        remote.generate(prompts, GREEDY)


def test_what_a_server_cannot_do_is_said(
    policy: Any, tiny_folder: Callable[[str], Path], server: VllmServer, tmp_path: Path
) -> None:
    remote, prompt = Remote(policy, server, tmp_path), encode(policy)[0]
    with pytest.raises(RolloutError, match=r"no sessions.*rollout.backend: local"):
        remote.session(prompt)
    with pytest.raises(ValueError, match="a prompt without messages"):
        remote.generate([type(prompt)(prompt.token_ids, prompt.positions)], GREEDY)
    with pytest.raises(ValueError, match="rng"):
        remote.generate([prompt], Sampling(1, 2))
    with pytest.raises(ValueError, match="expected an address"):
        VllmGenerator(policy, "localhost:8000", folder=tmp_path, updates=int)
    server.models = ["one", "two"]
    with pytest.raises(RolloutError, match="serves one, two: expected one base model"):
        remote.generate([prompt], GREEDY)
    tower = load_policy(tiny_folder("qwen2_5"), lora={"rank": 2, "targets": r".*visual.*\.qkv"})
    with pytest.raises(ValueError, match="only adapters of the language model can be served"):
        Remote(tower, server, tmp_path)
    whole = load_policy(tiny_folder("qwen2_5"), lora={"rank": 2, "also_train": ["visual.merger"]})
    with pytest.raises(ValueError, match="also_train"):
        Remote(whole, server, tmp_path)


def test_nothing_listens(policy: Any, tmp_path: Path) -> None:
    lonely = VllmGenerator(
        policy, "http://127.0.0.1:9", folder=tmp_path, updates=int, retries=1, sleep=lambda _: None, timeout=0.5
    )
    with pytest.raises(RolloutError, match=r"at http://127.0.0.1:9 did not answer, tried 2 times"):
        lonely.generate(encode(policy)[:1], GREEDY)


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_training_runs_on_a_server_with_weights_that_are_never_stale(
    lora: dict[str, Any] | None, server: VllmServer, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = make_recipe(
        tiny_folder("qwen2_5"),
        tmp_path / "run",
        model__lora=lora,
        rollout__backend="vllm",
        rollout__server=server.url,
        optim__steps=3,
        optim__lr=0.02,
    )
    summary = train(recipe, records=ocr_records(), show=False)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert summary.steps == 3
    assert len(rows) == 3
    for row in rows:
        assert math.isfinite(row["loss"])
        assert row["grad_norm"] > 0
        assert row["sampler/gap_max"] < 1e-3  # those of the previous update would differ by far more
        assert row["time/sync"] > 0
    pushed = server.asked("/v1/load_lora_adapter" if lora else "/collective_rpc")
    assert len(pushed) == 3
    assert not list((tmp_path / "run" / "rollout").iterdir())
    assert {"sampler/gap_max", "loss"} <= set(steady_rows(tmp_path / "run")[0])


@pytest.mark.parametrize("keeps", ["all", "head"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_a_server_that_keeps_old_weights_stops_the_run_before_it_learns_from_them(
    keeps: str, lora: dict[str, Any] | None, server: VllmServer, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    if lora and keeps == "head":
        pytest.skip("adapters leave the head alone")
    changes: dict[str, Any] = {"rollout__server": server.url, "model__lora": lora}
    changes |= {"optim__steps": 3, "optim__lr": 0.02, "rollout__server_gap": 0.01}
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path / "run", rollout__backend="vllm", **changes)
    server.keeps = keeps
    what = "the adapter" if lora else "all or some of the pushed weights"
    message = rf"step 2: the vLLM server at {server.url} does not sample.*over \d+ tokens.*not taken {what}"
    with pytest.raises(TrainingError, match=message):
        train(recipe, records=ocr_records(), show=False)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 1


def test_a_server_with_another_model_stops_the_first_step(
    server: VllmServer, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"rollout__server": server.url, "optim__gradient_release": True, "optim__clip_norm": None}
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path / "run", rollout__backend="vllm", **changes)
    disturb(server.base)
    server.keeps = "all"
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu")
    before = {name: p.detach().clone() for name, p in policy.core.named_parameters()}
    with pytest.raises(TrainingError, match=r"step 1: .* first answers in this run: does it serve the folder"):
        train(recipe, records=ocr_records(), policy=policy, show=False)
    assert [n for n, p in policy.core.named_parameters() if not torch.equal(p, before[n])] == []


@pytest.mark.gate
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.6}, {"top_k": 5}], ids=["whole", "top_p", "top_k"])
def test_other_temperatures_are_compared_with_what_the_server_reports(
    sampling: dict[str, Any], server: VllmServer, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The log-probs after truncation are larger than the trainer's, which is no fault; those of old weights are one."""
    server.mode = "processed_logprobs"
    rollout = {f"rollout__{key}": value for key, value in sampling.items()}
    if sampling:
        rollout["rollout__allow_truncated_sampling"] = True
    changes: dict[str, Any] = {"rollout__server": server.url, "rollout__temperature": 0.7, "optim__steps": 2, **rollout}
    # suppressed tokens, too, are left out: in this untrained model they have a few per cent
    changes |= {"rollout__backend": "vllm", "optim__lr": 0.02, "rollout__server_gap": 0.04}
    train(make_recipe(tiny_folder("qwen2_5"), tmp_path / "right", **changes), records=ocr_records(), show=False)
    rows = read_rows(tmp_path / "right" / "metrics.jsonl")
    assert all((row["sampler/gap_mean"] > 0.04) == bool(sampling) for row in rows)
    if "top_k" in sampling:
        return  # which says little about how large the server's may be
    server.restart()
    server.keeps = "all"
    with pytest.raises(TrainingError, match=r"step 2: .*does not sample"):
        train(make_recipe(tiny_folder("qwen2_5"), tmp_path / "stale", **changes), records=ocr_records(), show=False)


def test_a_server_that_refuses_new_weights_stops_the_run(
    server: VllmServer, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = make_recipe(
        tiny_folder("qwen2_5"), tmp_path / "run", rollout__backend="vllm", rollout__server=server.url, optim__steps=3
    )

    def spoil(row: dict[str, Any]) -> None:
        server.script = [well, status(403)]  # the pause succeeds, the new weights are refused

    with pytest.raises(RolloutError, match=r"pushing the weights after 1 updates.*refused: HTTP 403"):
        train(recipe, records=ocr_records(), show=False, on_step=spoil)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__backend": "vllm"}, "backend: vllm needs server"),
        ({"rollout__backend": "vllm", "rollout__server": "localhost"}, "expected an address such as"),
        ({"rollout__server": "http://a:1"}, "rollout.server and rollout.shared need rollout.backend: vllm"),
        ({"rollout__backend": "sglang"}, "rollout.backend"),
        ({"rollout__backend": "vllm", "rollout__server": ["http://a:1", "b:2"]}, "expected an address such as"),
        ({"rollout__backend": "vllm", "rollout__server": ["http://a:1"] * 2}, "one or more different addresses"),
        ({"rollout__backend": "vllm", "rollout__server": []}, "one or more different addresses"),
        (
            {
                "rollout__backend": "vllm",
                "rollout__server": "http://a:1",
                "model__lora": {"also_train": ["visual.merger"]},
            },
            "also_train empty",
        ),
    ],
)
def test_recipes_that_cannot_work_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(tmp_path, tmp_path, **changes)
