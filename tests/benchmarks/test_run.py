"""Measuring, the results file, the printed lines, the figure, the ahead-of-time table and the demos' table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import aot_table, measure, plot, run, verify
from benchmarks.case import Case
from fastrl.studies.workers import cores

CPU = torch.device("cpu")
PEAKS = {"flops": {"float32": 1e11}, "bytes_per_s": 1e10}


def fail(x: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    raise RuntimeError("no such luck\nsecond line")


def case(**changes: Any) -> Case:
    fields: dict[str, Any] = {
        "name": "double/it",
        "op": "double",
        "shape": {"N": 1000},
        "make": lambda device: {"x": torch.ones(1000, device=device)},
        "ours": lambda x: (x["x"] * 2,),
        "peers": {"off by half": lambda x: (x["x"] + 0.5 * x["x"],), "absent": None, "broken": fail},
        "bytes": 8000.0,
    }
    return Case(**fields | changes)


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return run.run_case(case(), CPU, PEAKS, rounds=3)


def test_a_row_says_what_was_measured_and_what_was_not(row: dict[str, Any]) -> None:
    ours, peer = row["results"]["fastrl"], row["results"]["off by half"]
    assert ours["rounds"] == 3
    assert ours["ratio"] == 1
    assert ours["difference"] == 0
    assert peer["difference"] == pytest.approx(0.25)
    assert peer["ratios"]["q1"] <= peer["ratio"] == peer["ratios"]["median"] <= peer["ratios"]["q3"]
    assert ours["cpu_seconds"] > 0
    assert isinstance(row["busy"], float)
    assert row["floor_seconds"] == pytest.approx(8000 / 1e10)
    assert ours["percent_of_floor"] == pytest.approx(100 * row["floor_seconds"] / ours["seconds"])
    assert ours["peak_bytes"] in range(4000, 8001)  # one result of 4000 bytes
    assert peer["peak_bytes"] >= 8000  # a temporary beside it
    assert "missing" in row["results"]["absent"]
    assert row["results"]["broken"] == {"error": "RuntimeError: no such luck"}


def test_the_floor_is_the_slower_of_matmul_and_traffic() -> None:
    found = run.run_case(case(flops=1e6, peers={}), CPU, PEAKS, rounds=1)
    assert found["floor_seconds"] == pytest.approx(1e-5)


def test_spread_of_rounds_and_when_they_are_unsteady() -> None:
    assert measure.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0}
    assert measure.spread([2.5]) == {"q1": 2.5, "median": 2.5, "q3": 2.5}
    assert measure.unsteady({"q1": 2.0, "median": 3.0, "q3": 4.0})
    assert not measure.unsteady({"q1": 2.9, "median": 3.0, "q3": 3.1})


def test_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"fastrl": iter([1.0, 4.0, 2.0]), "off by half": iter([2.0, 4.0, 8.0])}
    order = iter(["fastrl", "off by half"] * 3)
    monkeypatch.setattr(measure, "_calls_per_round", lambda *_: 1)
    monkeypatch.setattr(measure, "_seconds", lambda *_: next(seconds[next(order)]))
    found = run.run_case(case(peers={"off by half": lambda x: (x["x"] * 2,)}), CPU, PEAKS, rounds=3)
    assert found["results"]["off by half"]["ratios"] == {"q1": 1.5, "median": 2.0, "q3": 3.0}  # of 2, 1 and 4
    assert found["results"]["fastrl"]["ratio"] == 1


def test_reset_comes_before_every_call() -> None:
    def ours(x: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        x["x"] *= 2
        return (x["x"],)

    peers = {"same": ours, "triple": lambda x: (3 * x["x"],)}
    found = run.run_case(case(ours=ours, peers=peers, reset=lambda x: x["x"].fill_(1)), CPU, PEAKS, rounds=2)
    assert found["results"]["same"]["difference"] == 0
    assert found["results"]["triple"]["difference"] == 0.5  # ours kept its 2 although the input was reset


def test_rounds_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    measure.interleaved(calls, CPU, 2, reset=lambda: order.append("reset"))
    assert order == ["reset", "a", "reset", "b"] * 2


def test_lines_and_environment(row: dict[str, Any]) -> None:
    lines = [run.line(row, name, result) for name, result in row["results"].items()]
    assert lines[0].startswith("double/it")
    assert re.search(r"\d\.\d\dx \[\d+\.\d\d, \d+\.\d\d\]!?$", lines[1])
    assert "not installed" in lines[2]
    assert "no such luck" in lines[3]
    found = run.environment(CPU)
    assert str(torch.__version__).startswith(found["versions"]["torch"].split("+")[0])
    assert {"device", "threads", "load", "commit", "modified", "date"} <= set(found)


def test_command_writes_results_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(run, "cases", lambda size, only: [case(), case(name="other/one", peers={})])
    monkeypatch.setattr(run, "device_peaks", lambda device: PEAKS)
    monkeypatch.setattr(run, "default_device", lambda: CPU)
    assert run.main(["--quick", "--json", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert [found["name"] for found in written["cases"]] == ["double/it", "other/one"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "double/it" in capsys.readouterr().out
    monkeypatch.setattr(run, "cases", lambda size, only: [case(ours=fail)])
    assert run.main(["--quick"]) == 1


def test_peaks_are_measured_where_no_table_has_them() -> None:
    found = measure.device_peaks(CPU)
    assert found["source"].startswith("measured")
    assert found["flops"]["float32"] > 1e8
    assert found["bytes_per_s"] > 1e7


def test_figure_needs_a_measured_peer(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text(json.dumps({"cases": []}))
    with pytest.raises(ValueError, match="no case with a measured peer"):
        plot.plot(tmp_path / "empty.json")


def test_ahead_of_time_table() -> None:
    one = {"name": "k", "arch": 80, "warps": 4, "registers": 32, "stack": 0, "shared": 0, "call": "f(x=f32[1])"}
    one |= {"instructions": 99, "barriers": 0}
    other = one | {"registers": 64, "stack": 8, "call": "g(x=f32[1]), backward"}
    payload = {"triton": "3.7.1", "kernels": [one, other, one | {"arch": 90, "registers": 40}]}
    document = f"before\n{aot_table.BEGIN}\nold\n{aot_table.END}\nafter\n"
    found = aot_table.embed(document, payload)
    assert "| `k` | `f`, `g` | 3 | 32–64 / 0 / 99 | 40 / 0 / 99 | 8 |" in found
    assert "old" not in found
    assert found.startswith("before\n")
    assert found.endswith("after\n")
    assert aot_table.embed(found, payload) == found
    with pytest.raises(ValueError, match="aot table"):
        aot_table.embed("no marks", payload)


def result(seed: int, before: float, after: float, task: str | None = "grounding") -> dict[str, Any]:
    scores = {"metric": "iou", "before": before, "after": after, "greedy_before": 0.6, "greedy_after": 0.61}
    change = {"before": before, "after": after, "change": after - before}
    interval = change | {"low": after - before - 0.02, "high": after - before + 0.02}
    changes = {"sampled": interval, "greedy": interval}
    if task == "counting":
        fall = {"before": 0.2, "after": 0.1, "change": -0.1, "low": -0.12, "high": -0.08}
        changes |= {"sampled, distance": fall, "greedy, distance": fall}
    unseen = {"n": 512, "changes": changes}
    return {"method": "perception-r1", "task": task, "seed": seed, **scores, "seconds": 100.0 + seed, "unseen": unseen}


def test_demo_table_has_every_run_and_the_mean_over_seeds() -> None:
    lines = verify.table([result(0, 0.2, 0.5), result(1, 0.2, 0.7), result(0, 0.5, 0.4, "counting")]).splitlines()
    assert len(lines) == 1 + (3 + 3) + (2 + 5)
    sampled, greedy = lines[3].split("|")
    assert " ".join(sampled.split()) == "perception-r1 grounding iou mean 0.200 0.600 +0.400 ± 0.141"
    assert greedy.split() == ["0.600", "0.610", "+0.010", "±", "0.000", "100"]
    assert lines[4] == "  on 512 others, 95 % intervals over them:"
    shown = "sampled 0.200 0.600 +0.300 [+0.280, +0.320] +0.500 [+0.480, +0.520] ± 0.141"
    assert " ".join(lines[5].split()) == shown
    assert lines[8].split("|")[0].split()[-1] == "-0.100"
    assert "±" not in lines[-1]  # of one seed


def test_demo_table_has_the_further_measures_of_counting_and_what_they_leave_out() -> None:
    distances = {"distance_before": 0.3, "distance_after": 0.1}
    points = {"points_before": 0.3, "points_after": 0.5}
    further = distances | {f"greedy_{key}": value for key, value in distances.items()}
    further |= points | {f"greedy_{key}": value + 0.1 for key, value in points.items()}
    rows: list[dict[str, Any]] = [result(seed, 0.6, 0.7, "counting") | further for seed in range(2)]
    rows[1]["unseen"]["changes"]["greedy"] = rows[1]["unseen"]["changes"]["greedy"] | {"left_out": 3}
    lines = verify.table(rows).splitlines()
    distance, reward, _, sampled, greedy = lines[-7:-2]
    assert " ".join(distance.split("|")[0].split()) == "perception-r1 counting distance mean 0.300 0.100 -0.200 ± 0.000"
    assert " ".join(reward.split("|")[0].split()) == "perception-r1 counting points mean 0.300 0.500 +0.200 ± 0.000"
    assert reward.split("|")[1].split()[:3] == ["0.400", "0.600", "+0.200"]
    assert "without" not in sampled
    assert greedy.endswith("  without 0, 3")


def test_demo_table_compares_models_where_a_demo_does() -> None:
    models = [{"start": {"mean_iou": 0.4}, "perpo": {"mean_iou": v}} for v in (0.5, 0.7)]
    rows = [result(n, 0.4, m["perpo"]["mean_iou"]) | {"models": m} for n, m in enumerate(models)]
    assert verify.table(rows).splitlines()[-5:-3] == [
        f"  {'start':23} mean_iou 0.400",
        f"  {'perpo':23} mean_iou 0.600",
    ]


def test_verify_fails_where_a_demo_fails_or_its_claim_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    outcomes = {0: (0.1, 0.3), 1: (0.3, 0.34)}
    given: list[int | None] = []

    def fake(
        method: str, task: str | None, seed: int, out: Path, family: str | None, threads: int | None
    ) -> dict[str, Any]:
        given.append(threads)
        if seed == 2:
            raise RuntimeError("demo fell over")
        return result(seed, *outcomes[seed], task)

    monkeypatch.setattr(verify, "run_demo", fake)
    monkeypatch.setattr(verify, "jobs", lambda family: [("perception-r1", "grounding"), ("perception-r1", "counting")])
    target = tmp_path / "verify.json"
    assert verify.main(["--only", "grounding", "--seeds", "0", "--json", str(target)]) == 0
    (first,) = json.loads(target.read_text())["results"]
    assert first == {key: first[key] for key in verify.OF_RUN} | result(0, 0.1, 0.3)
    assert "every claim holds" in capsys.readouterr().out
    assert verify.main(["--only", "counting", "--json", str(target)]) == 1
    printed = capsys.readouterr().out
    assert "demo fell over" in printed
    assert "perception-r1 counting seed 1: sampled changed by +0.0400 [+0.0200, +0.0600], not above 0.05" in printed
    written = json.loads(target.read_text())
    assert len(written["broken"]) == 1
    assert written["results"][0] == first  # the other demo's are kept
    assert set(given) == {None}
    assert verify.main(["--only", "counting", "--jobs", "2", "--json", str(target)]) == 1
    assert set(given[-3:]) == {max(1, cores() // 2)}
    again = json.loads(target.read_text())
    assert [row | {"jobs": 1, "threads": written["threads"]} for row in again["results"]] == written["results"]
    assert again["threads"] == given[-1]
    assert again["failed"] == ["demo fell over"]
    with pytest.raises(SystemExit):
        verify.main(["--jobs", "0", "--json", str(target)])


def run_of(commit: str, *rows: dict[str, Any], modified: bool = False) -> dict[str, Any]:
    known = dict.fromkeys(verify.OF_RUN, "x") | {"commit": commit, "modified": modified}
    return {**known, "results": list(rows), "failed": []}


def test_a_part_of_the_demos_keeps_the_results_of_the_others_with_what_is_known_of_their_run(tmp_path: Path) -> None:
    target = tmp_path / "verify.json"
    every: list[tuple[str, str | None]] = [
        ("perception-r1", "grounding"),
        ("perception-r1", "counting"),
        ("perpo", None),
    ]

    def merged(found: dict[str, Any], *chosen: tuple[str, str | None]) -> tuple[Any, ...]:
        result = verify.with_others(found, verify.stored_results(target), list(chosen), every)
        target.write_text(json.dumps(result))
        rows = [(row["task"], row["seed"], row["commit"]) for row in result["results"]]
        return result["commit"], result["modified"], len(result["broken"]), rows

    grounding, counting = every[:2]
    assert verify.stored_results(target) == []
    gone = result(0, 0.1, 0.3) | {"method": "juggling"}
    first = run_of("a", result(0, 0.1, 0.3), result(1, 0.1, 0.3), gone, result(0, 0.3, 0.34, "counting"))
    target.write_text(json.dumps(first))
    both = [("grounding", 0, "b"), ("counting", 0, "a")]  # the seed that was not run is gone
    assert merged(run_of("b", result(0, 0.1, 0.3), modified=True), grounding) == ("b, a", True, 1, both)
    both = [("grounding", 0, "b"), ("counting", 0, "c")]
    assert merged(run_of("c", result(0, 0.3, 0.4, "counting")), counting) == ("b, c", True, 0, both)
    both = [("grounding", 0, "d"), ("counting", 0, "c")]
    assert merged(run_of("d", result(0, 0.1, 0.3)), grounding) == ("d, c", False, 0, both)
    # One that was asked for and failed on all seeds has no result
    assert merged(run_of("e", result(0, 0.1, 0.3)), grounding, counting)[-1] == [("grounding", 0, "e")]
    own = result(0, 0.1, 0.3) | {"method": "perpo"}  # its demo has one task, which is not asked for
    target.write_text(json.dumps(run_of("e", own | {"commit": "f"}, result(0, 0.1, 0.3))))
    assert [row["commit"] for row in verify.with_others(
        run_of("g", own), verify.stored_results(target), every[2:], every
    )["results"]] == ["e", "g"]  # fmt: skip


KNOWN = json.dumps(dict.fromkeys(verify.OF_RUN, "x"))[:-1]  # of a run, without the end of its object


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"results": [{}]}',
        '{"results": 3}',
        KNOWN + ', "results": [{}]}',
        KNOWN + ', "results": [{"method": "utr", "task": "trajectory", "seed": 0}]}',  # nothing a claim is held to
    ],
)
def test_a_file_that_others_results_cannot_be_kept_of_is_refused_before_anything_runs(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(verify, "run_demo", lambda *args: pytest.fail("a demo was run"))
    (tmp_path / "verify.json").write_text(text)
    with pytest.raises(SystemExit):
        verify.main(["--only", "perpo", "--json", str(tmp_path / "verify.json")])
    assert "has no results of demos" in capsys.readouterr().err


def test_another_family_has_results_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "RESULTS", tmp_path / "verify.json")
    monkeypatch.setattr(verify, "run_demo", lambda *args: result(0, 0.1, 0.3) | {"method": "perpo"})
    monkeypatch.setattr(verify, "broken_claims", lambda results: [])
    assert verify.main(["--only", "perpo", "--family", "llava", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["verify-llava.json"]
    assert json.loads((tmp_path / "verify-llava.json").read_text())["family"] == "llava"


def test_every_demo_makes_a_claim() -> None:
    from fastrl.toy.demos import DEMOS

    assert all(verify.claim_of(method).checks for method in DEMOS)


def test_verify_knows_every_demo() -> None:
    from fastrl.toy.demos import DEMOS

    assert {method for method, _ in verify.jobs()} == set(DEMOS)
    assert ("perception-r1", "counting") in verify.jobs()
    assert verify.jobs("llava") == [("perpo", None), ("reper", None), ("utr", None)]


def test_a_demo_is_read_from_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode = 0
        stdout = 'a table\n{"metric": "iou", "before": 0.1, "after": 0.2, "seconds": 3, "out": "here"}\n'

    seen: list[Any] = []
    monkeypatch.setattr(verify.subprocess, "run", lambda command, **_: seen.append(command) or Done)
    found = verify.run_demo("perpo", None, 2, tmp_path)
    assert found["after"] == 0.2
    assert "out" not in found
    assert seen[0][seen[0].index("--out") + 1] == str(tmp_path / "perpo-2")
    assert "--family" not in seen[0]
    verify.run_demo("perpo", None, 2, tmp_path, "llava")
    assert seen[1][seen[1].index("--family") + 1] == "llava"
    monkeypatch.setattr(verify.subprocess, "run", lambda command, env, **_: seen.append(env) or Done)
    verify.run_demo("perpo", None, 2, tmp_path, threads=3)
    assert seen[2]["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(Done, "stdout", "no result")
    with pytest.raises(RuntimeError, match="demo perpo  seed 2: exit status 0, no result"):
        verify.run_demo("perpo", None, 2, tmp_path)
