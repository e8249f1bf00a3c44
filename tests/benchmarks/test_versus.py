"""The comparison with TRL: equal gradients from equal tokens, phases that sum to the step, forced lengths, report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import table, vs_trl
from benchmarks.versus import gradients, measure, work
from benchmarks.versus.model import build_folder, config_3b, load_processor

pytest.importorskip("trl")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder("small", tmp_path_factory.mktemp("model"), CPU)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_gradients_of_one_step_are_the_same(folder: Path, tmp_path: Path, train: str) -> None:
    found = gradients.compare(folder, work.TINY, tmp_path, train=train, device=CPU)
    assert found["cosine"] >= 0.9999
    assert found["norm_ratio"] == pytest.approx(1, abs=1e-3)
    assert found["tokens"] == work.TINY.rows * work.TINY.answer
    assert found["values"] == (6_895_520 if train == "full" else 439_296)


@pytest.mark.gpu
@pytest.mark.parametrize("train", ["full", "lora"])
def test_gradients_of_one_step_are_the_same_on_a_gpu(folder: Path, tmp_path: Path, train: str) -> None:
    found = gradients.compare(folder, work.GOAL, tmp_path, train=train, device=torch.device("cuda"))
    assert found["cosine"] >= 0.9999
    assert found["norm_ratio"] == pytest.approx(1, abs=1e-3)


def test_other_training_is_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = gradients.Fastrl

    def other(*arguments: Any, **named: Any) -> Any:
        side = changed(*arguments, **named)
        side.run.method.options = side.run.method.options.model_copy(update={"scale": "none"})  # as Dr. GRPO
        return side

    monkeypatch.setattr(gradients, "Fastrl", other)
    with pytest.raises(gradients.GradientMismatch, match="gradients differ"):
        gradients.compare(folder, work.TINY, tmp_path, train="full", device=CPU)


def test_agreement_of_known_vectors() -> None:
    one = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([2.0])}
    twice = {name: 2 * g for name, g in one.items()}
    found = gradients.agreement(twice, one)
    assert found["cosine"] == pytest.approx(1)
    assert found["norm_ratio"] == pytest.approx(2)
    assert found["values"] == 3
    turned = gradients.agreement({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([2.0])}, one)
    assert turned["cosine"] == pytest.approx(0.8)
    assert turned["worst_parameter"] == "a"
    with pytest.raises(gradients.GradientMismatch, match="trained parameters differ"):
        gradients.agreement({"a": one["a"]}, one)


@pytest.mark.gate
def test_a_case_has_every_number_of_both_sides(folder: Path, tmp_path: Path) -> None:
    bench = vs_trl.Bench(folder, tmp_path, CPU, rounds=1)
    case = bench.case(work.TINY, "full", "equal")
    for side in case["sides"].values():
        assert len(side["all_seconds"]) == 1
        assert set(side["phases"]) == set(measure.PHASES)
        assert all(side["phases"][name] > 0 for name in measure.PHASES)
        assert side["seconds"] == pytest.approx(sum(side["phases"].values()))
        assert side["static_bytes"] >= 3 * 4 * 6_895_520  # weights and two moments
        assert side["peak_bytes"] > side["static_bytes"] + 4 * 6_895_520  # and the gradient
        assert side["cpu_seconds"] > 0
        assert side["answer_tokens_per_s"] == pytest.approx(8 * 5 / side["seconds"])
    ours, theirs = case["sides"]["fastrl"], case["sides"]["trl"]
    assert ours["flops"] < theirs["flops"]
    matmul = case["sides"]["trl+matmul"]
    assert 0.9 * theirs["flops"] < matmul["flops"] <= theirs["flops"]  # the counter may not know the convolution
    assert case["ratio_matmul"]["cpu_seconds"] == matmul["cpu_seconds"] / ours["cpu_seconds"]
    assert case["ratio"]["spread"]["median"] == case["ratio"]["seconds"] == theirs["seconds"] / ours["seconds"]
    assert case["busy"] >= 0
    assert case["ratio"]["flops"] == theirs["flops"] / ours["flops"]
    assert ours["sampler_gap"]["sampler/gap_max"] < 1e-4
    assert case["rows"] == {"fastrl": 4, "trl": 4}
    assert "GFLOP" in vs_trl.line(case)[1]
    assert [text.split()[0] for text in vs_trl.line(case)[1:]] == ["fastrl", "trl", "trl+matmul", "ratio", "matmul"]
    json.dumps(case)


def test_patches_embedded_by_a_product_are_those_of_the_convolution(folder: Path) -> None:
    from benchmarks.versus import theirs

    embed: Any = theirs._patch_embedding(theirs._model(folder, bfloat16=False))
    patches = torch.randn(8, embed.proj.weight[0].numel())
    shipped = embed(patches)
    with theirs.by_matmul(embed):
        assert embed(patches).shape == shipped.shape
        torch.testing.assert_close(embed(patches), shipped, rtol=1e-5, atol=1e-6)
        embed.proj.forward = None  # which nothing calls
        embed(patches)
    assert "forward" not in vars(embed)


def test_a_trainer_of_both_forms_sees_each_steps_records_twice() -> None:
    from benchmarks.versus.theirs import _twice

    records: Any = list("abcd")
    assert _twice(records, 2) == list("ababcdcd")


def test_best_tries_micro_batches_of_both_sides(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = vs_trl.Bench(folder, tmp_path, CPU, rounds=1)
    times = {("fastrl", 4): 3.0, ("fastrl", 8): 2.0, ("trl", 2): 1.0, ("trl", 4): 2.0}

    class Side:
        def __init__(self, seconds: float) -> None:
            self.recorder = measure.Recorder(CPU, measure.Phases(CPU))
            self.recorder.seconds = [seconds]

    def alone(name: str, item: work.Work, train: str, rows: int, kinds: Any) -> Side:
        if (name, rows) not in times:
            raise torch.OutOfMemoryError("no room")
        return Side(times[name, rows])

    monkeypatch.setattr(bench, "_alone", alone)
    monkeypatch.setattr(
        bench, "_in_turn", lambda item, train, rows, kinds, **_: {name: {"error": "no room"} for name in rows}
    )
    case = bench.case(work.TINY, "full", "best")
    assert case["rows"] == {"fastrl": 8, "trl": 2}
    assert case["tried"] == {"fastrl": {4: 3.0, 8: 2.0}, "trl": {2: 1.0, 4: 2.0}}
    assert case["ratio"] == {}
    assert "no room" in vs_trl.line(case)[1]


def test_time_inside_a_phase_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(measure, "now", lambda device: next(ticks))
    phases = measure.Phases(CPU)
    with phases.phase("outer"), phases.phase("inner"):
        pass
    assert phases.read() == {"outer": 5.0, "inner": 2.0}
    assert phases.read() == {}


@pytest.mark.parametrize("item", [*work.works("small"), *work.works("3b"), work.TINY], ids=lambda item: item.name)
def test_prompts_have_the_wanted_length(folder: Path, tmp_path: Path, item: work.Work) -> None:
    processor = load_processor(folder)
    record, other = work.make_records(item, 2, tmp_path, processor.tokenizer)
    conversation = [{"role": "user", "content": [*record.messages[0]["content"]]}]
    if item.picture:
        conversation[0]["content"][0] = {"type": "image", "image": str(record.images[0])}
        assert record.images[0].read_bytes() != other.images[0].read_bytes()
    ids = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert len(ids["input_ids"][0]) == item.prompt
    with pytest.raises(ValueError, match="cannot make a prompt of 10 tokens"):
        work.make_records(replace(item, prompt=10), 1, tmp_path, processor.tokenizer)


def test_the_large_model_has_the_sizes_of_the_released_one(folder: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config_3b(load_processor(folder).tokenizer))
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    embedding = parameters.pop("model.language_model.embed_tokens.weight")  # of this test's tokenizer
    assert embedding == 3200 * 2048
    assert sum(parameters.values()) == 3_754_622_976 - 151_936 * 2048


def test_every_case_is_planned_and_can_be_chosen() -> None:
    names = [(item.name, train, micro) for item, train, micro in vs_trl.plan("3b", ["lora", "full"], "", True)]
    assert len(names) == 12
    assert [name for name in names if name[0] == "short text prompt" and name[2] == "equal"]
    assert len(vs_trl.plan("small", ["full"], "goal", True)) == 2
    assert all(micro == "equal" for _, _, micro in vs_trl.plan("small", ["full"], "", False))


def test_vllm_is_a_case_of_a_gpu_that_has_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import GRPOConfig

    monkeypatch.setattr(vs_trl.importlib.util, "find_spec", lambda name: name == "vllm")
    assert [micro for *_, micro in vs_trl.plan("3b", ["lora"], "", False)] == ["equal"] * 3 + ["vllm"] * 3
    assert all(micro == "equal" for *_, micro in vs_trl.plan("small", ["full"], "", False))
    made: list[dict[str, Any]] = []

    class Side:
        def __init__(self, *_: Any, **named: Any) -> None:
            made.append(named)
            raise torch.OutOfMemoryError("enough")

    monkeypatch.setattr(vs_trl, "Trl", Side)
    bench = vs_trl.Bench(folder, tmp_path, torch.device("cuda"), rounds=1)
    monkeypatch.setattr(bench, "_ours", Side)
    case = bench.case(work.TINY, "lora", "vllm")
    assert case["interleaved"] is False
    assert (made[-1]["use_vllm"], made[-1]["vllm_mode"]) == (True, "colocate")
    assert made[-1]["vllm_max_model_length"] == 48 + 5
    assert {name for name in made[-1] if name.startswith("vllm")} <= set(GRPOConfig.__dataclass_fields__)
    assert -100.0 in made[-1]["generation_kwargs"]["logit_bias"].values()
    assert bench.case(work.TINY, "lora", "equal")["interleaved"] is True
    assert "use_vllm" not in made[-1]


def test_command_writes_gradients_cases_and_what_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(vs_trl, "compare", lambda *_, **__: {"cosine": 1.0, "norm_ratio": 1.0})
    side = {
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "phases": dict.fromkeys(measure.PHASES, 0.1),
        "flops": 10**9,
        "peak_bytes": 1 << 20,
    }
    case = {"sides": {"fastrl": side, "trl": side}, "ratio": {"seconds": 1.0}, "rows": {"fastrl": 8, "trl": 8}}
    named = {"work": {"name": "goal"}, "train": "full", "micro_batch": "equal"}
    monkeypatch.setattr(vs_trl.Bench, "case", lambda self, item, train, micro: case | named)
    target = tmp_path / "out.json"
    assert vs_trl.main(["--device", "cpu", "--only", "goal", "--json", str(target)]) == 0
    written = json.loads(target.read_text())
    assert len(written["cases"]) == 2
    assert written["gradients"] == [{"cosine": 1.0, "norm_ratio": 1.0}]
    assert "Equal on both sides" in written["fairness"]
    assert {"device", "versions", "commit"} <= set(written)
    assert "seconds 1.00" in capsys.readouterr().out
    assert vs_trl.main(["--device", "cpu", "--only", "goal", "--seconds", "-1", "--json", str(target)]) == 0
    assert len(json.loads(target.read_text())["not_run"]) == 2

    def mismatch(*_: Any, **__: Any) -> None:
        raise gradients.GradientMismatch("gradients differ")

    monkeypatch.setattr(vs_trl, "compare", mismatch)
    assert vs_trl.main(["--device", "cpu", "--only", "goal"]) == 1


def test_tables_say_what_the_files_say() -> None:
    made = {"device": {"name": "A CPU"}, "threads": 2, "load": 0.5, "commit": "abc", "date": "2026-01-01"}
    made |= {"versions": {"torch": "2.13", "triton": None}}
    ours = {"seconds": 0.002, "percent_of_floor": 50.0, "peak_bytes": 1 << 20, "ratio": 1.0}
    results = {"fastrl": ours, "scipy": ours | {"seconds": 0.012, "ratio": 6.0}, "absent": {"missing": "not installed"}}
    found = table.tables(made | {"cases": [{"name": "op/one", "results": results}]})
    assert "A CPU, 2 threads, load 0.5, commit abc, 2026-01-01: torch 2.13" in found
    assert "| op/one | 2 | 50 % | 1.0 | scipy 6.00× (1.0) |" in found

    case: dict[str, Any] = {"work": vars(work.TINY), "train": "full", "micro_batch": "equal"}
    case |= {"rows": {"fastrl": 4, "trl": 4}, "ratio": {"seconds": 6.0, "forward": 7.0, "peak_bytes": 5.0}}
    case |= {"sides": {"fastrl": {"seconds": 1.0}, "trl": {"seconds": 6.0}}}
    failed = case | {"ratio": {}, "sides": {"fastrl": {"seconds": 1.0}, "trl": {"error": "out of memory"}}}
    gradient = {"train": "full", "cosine": 1.0, "norm_ratio": 1.0}
    found = table.tables(made | {"fairness": "…", "gradients": [gradient], "cases": [case, failed]})
    assert "full: cosine 1.0000000, norm ratio 1.000000." in found
    start = "| tiny | 48 / 5 / 4 × 2 | full | 4 / 4 (equal) |"
    assert f"{start} 6.00 | 1.00 | **6.0×** |  |  |  | 7.0× |  | 5.0× |  |" in found
    spread = {"q1": 4.0, "median": 6.0, "q3": 7.0}
    measured = case | {"ratio": case["ratio"] | {"spread": spread}, "ratio_matmul": {"seconds": 3.0}}
    found = table.tables(made | {"busy": 0.3, "fairness": "…", "gradients": [gradient], "cases": [measured]})
    assert f"{start} 6.00 | 1.00 | **6.0×** [4.00, 7.00]! | 3.0× |  |  | 7.0× |  | 5.0× |  |" in found
    assert "load 0.5, others took 0.30 cores, commit abc" in found
    found = table.tables(made | {"fairness": "…", "gradients": [gradient], "cases": [case, failed]})
    assert f"{start} out of memory | 1.00 |" in found
    assert table.tables({"kernels": []}) == ""
