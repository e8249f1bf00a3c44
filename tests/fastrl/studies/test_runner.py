"""Studies in general: resuming, refusals, the choice of rates, and tables from fixed scores."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastrl.cli.main import main
from fastrl.studies import STUDIES, all_studies, study_class
from fastrl.studies.base import EXPECTED, REPORTED, About, Arm, Job, Line, Measured, Plot, Study
from fastrl.studies.outcome import (
    answer,
    change_rows,
    claim_rows,
    conditions,
    interval_of,
    print_result,
    seen,
    verdict,
)
from fastrl.studies.runner import beyond, check_folder, folder_name, run_study
from fastrl.toy.demos.evidence import Compared, change


class Fixed(Study):
    """Scores that follow from arm, seed and rate; ``ran`` are the jobs that were run."""

    about = About("fixed", "does a differ from b?", "none", "none", "a above b", 1, 1)
    measures = {"score": "score"}  # noqa: RUF012
    rates = (0.1, 0.2, 0.3)
    seeds = 2

    def __init__(self, *, quick: bool = False, fails_at: str = "", size: int = 4) -> None:
        super().__init__(quick=quick)
        self.ran: list[tuple[str, int, float | None]] = []
        self.made: list[int] = []
        self.fails_at, self.size = fails_at, size

    def arms(self) -> Sequence[Arm]:
        return [Arm("start"), Arm("a", "a"), Arm("b", "b"), Arm("b/long", "b", quick=False)]

    def comparisons(self) -> Sequence[Compared]:
        names = ("a", "b", "b/long", "a − b")
        return [change(name, "score", "start", name) for name in names]

    def claims(self) -> Mapping[str, str]:
        return {"a": "rises", "b": "does not fall", "b/long": "rises"}

    def differences(self) -> Mapping[str, tuple[str, str]]:
        return {"a − b": ("a", "b")}

    def plots(self) -> Sequence[Plot]:
        return [Plot("lengths", "length", "score", [Line("b", [(1, "b"), (2, "b/long")])])]

    def settings(self) -> Mapping[str, Any]:
        return {"size": self.size}

    def begin(self) -> None:
        pass

    def prepare(self, seed: int, shared: Path) -> None:
        self.made.append(seed)

    def run(self, job: Job) -> Mapping[str, Measured]:
        if job.arm.name == self.fails_at:
            raise RuntimeError("stopped")
        self.ran.append((job.arm.name, job.seed, job.rate))
        (job.folder / "run").mkdir()
        best = {"a": 0.1, "b": 0.3}.get(job.arm.group, 0.0)
        base = {"start": 0.0, "a": 1.0, "b": -1.0, "b/long": 0.0}[job.arm.name]
        value = base + job.seed - abs((job.rate or 0.0) - best)
        found = Measured(["r0", "r1", "r2", "r3"], {"score": [value, value, value + 0.5, value - 0.5]}, {"AP": value})
        return dict.fromkeys(job.sets, found)


def test_rates_are_chosen_for_each_group_by_seed_0_on_the_choosing_set(tmp_path: Path) -> None:
    study = Fixed()
    result = run_study(study, tmp_path)
    assert result["rates"] == {"a": 0.1, "b": 0.3}
    reported = [job for job in study.ran if job[1] == 1 or job[0] in ("start", "b/long")]
    assert reported == [("start", 0, None), ("b/long", 0, 0.3), ("a", 1, 0.1), ("b", 1, 0.3), ("b/long", 1, 0.3)]
    assert sorted(job for job in study.ran if job not in reported) == [
        *(("a", 0, rate) for rate in (0.05, *study.rates)),  # the best value of a grid is not left at its end
        *(("b", 0, rate) for rate in (*study.rates, 0.45)),
    ]
    means = {"a": [0.95, 1.0, 0.9, 0.8], "b": [-1.2, -1.1, -1.0, -1.15]}
    rates = {"a": [0.05, 0.1, 0.2, 0.3], "b": [0.1, 0.2, 0.3, 0.45]}
    for group, tried in result["tried"].items():
        assert [rate for rate, _ in tried] == rates[group]
        assert [mean for _, mean in tried] == pytest.approx(means[group])
    assert result["tried_betas"] == {}
    assert (tmp_path / "a" / "seed-0" / "rate-0.1" / "choosing.jsonl").is_file()
    assert not (tmp_path / "a" / "seed-1" / "rate-0.1" / "choosing.jsonl").exists()


def test_a_grid_grows_towards_its_best_end_and_not_for_ever(tmp_path: Path) -> None:
    assert beyond({1.0: 0.0, 2.0: 1.0, 4.0: 0.0}) == []
    assert beyond({4.0: 1.0, 1.0: 0.0, 2.0: 0.0}) == [8.0]
    assert beyond({5e-5: 1.0, 1e-4: 0.0}) == [2.5e-5]

    class Rising(Fixed):
        def run(self, job: Job) -> Mapping[str, Measured]:
            self.ran.append((job.arm.name, job.seed, job.rate))
            return dict.fromkeys(
                job.sets, Measured(["r"], {"score": [job.rate or 0.0], "falling": [-(job.rate or 0.0)]})
            )

    class Falling(Rising):
        chosen_by = {"b": "falling"}  # noqa: RUF012

    found = run_study(Rising(), tmp_path / "rising")
    assert found["rates"] == {"a": 1.0125, "b": 1.0125}
    assert [rate for rate, _ in found["tried"]["a"]] == [0.1, 0.2, 0.3, 0.45, 0.675, 1.0125]
    assert run_study(Falling(), tmp_path / "falling")["rates"] == {"a": 1.0125, "b": 0.0125}


def test_seconds_of_what_all_seeds_share_count_and_do_so_where_nothing_is_trained(tmp_path: Path) -> None:
    class Taught(Fixed):
        def prepare(self, seed: int, shared: Path) -> None:
            base = shared.parent / "base"  # not in the seed's folder, which does not exist
            end = time.process_time() + (0.0 if base.is_dir() else 0.3)
            while time.process_time() < end:
                pass
            base.mkdir(exist_ok=True)

        def obstacle(self, untrained: Mapping[str, Measured]) -> str:
            return "the base does not do it"

    found = run_study(Taught(), tmp_path)
    assert found["stopped"]
    assert found["process_cpu_seconds"] - found["cpu_seconds"] >= 0.3


class WithBeta(Fixed):
    """Also has a β in one of its groups; 0.4 is best, and only at the best rate."""

    betas = {"a": (0.1, 0.2, 0.4)}  # noqa: RUF012

    def run(self, job: Job) -> Mapping[str, Measured]:
        found = super().run(job)
        more = {0.1: -0.2, 0.2: 0.0, 0.4: 0.5 if job.rate == 0.1 else -1.0}.get(job.beta or 0.0, 0.0)
        shifted = {
            n: m._replace(scores={k: [v + more for v in vs] for k, vs in m.scores.items()}) for n, m in found.items()
        }
        self.tried = [*getattr(self, "tried", []), (job.arm.name, job.seed, job.rate, job.beta)]
        return shifted


def test_beta_is_chosen_at_the_chosen_rate_and_no_job_is_run_twice(tmp_path: Path) -> None:
    study = WithBeta()
    result = run_study(study, tmp_path)
    assert result["rates"] == {"a": 0.1, "b": 0.3}
    assert result["betas"] == {"a": 0.4}
    of_a = [job[1:] for job in study.tried if job[0] == "a"]
    rates, betas = (0.1, 0.2, 0.3, 0.05), (0.1, 0.4, 0.8)
    assert of_a == [*((0, rate, 0.2) for rate in rates), *((0, 0.1, beta) for beta in betas), (1, 0.1, 0.4)]
    assert [beta for beta, _ in result["tried_betas"]["a"]] == [0.1, 0.2, 0.4, 0.8]
    assert {job[3] for job in study.tried if job[0] != "a"} == {None}
    assert (tmp_path / "a" / "seed-1" / "rate-0.1-beta-0.4" / "done.json").is_file()
    assert "so was β: a 0.4" in conditions(result)
    again = WithBeta()
    assert run_study(again, tmp_path)["betas"] == {"a": 0.4}
    assert again.ran == []


def test_a_quick_study_takes_the_middle_of_both_grids(tmp_path: Path) -> None:
    study = WithBeta(quick=True)
    assert run_study(study, tmp_path)["betas"] == {"a": 0.2}
    assert study.tried == [("start", 0, None, None), ("a", 0, 0.2, 0.2), ("b", 0, 0.2, None)]


def test_the_table_has_means_changes_intervals_and_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Fixed()
    result = run_study(study, tmp_path)
    assert result["arms"]["a"]["score"] == {"mean": pytest.approx(1.5), "seeds": pytest.approx([1.0, 2.0])}
    assert result["arms"]["a"]["AP"]["mean"] == pytest.approx(1.5)
    found = result["changes"]["a"]
    assert (found["before"], found["change"]) == (pytest.approx(0.0), pytest.approx(1.5))
    assert (found["low"], found["high"]) == (pytest.approx(1.0), pytest.approx(2.0))  # one seed's or the other's
    assert found["seeds"] == pytest.approx([1.0, 2.0])
    assert result["changes"]["a − b"]["change"] == pytest.approx(2.0)
    assert [row[-1] for row in change_rows(result)[1]] == ["rises", "level", "level", "rises"]
    print_result(study, result)
    shown = capsys.readouterr().out
    assert "does a differ from b?" in shown
    assert "+1.500" in shown
    assert "± 0.707" in shown
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["id"] for line in scores] == ["r0", "r1", "r2", "r3"]
    assert scores[2]["a"]["score"] == pytest.approx(2.0)
    page = (tmp_path / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "does a differ from b?" in page
    assert json.loads((tmp_path / "results.json").read_text())["changes"] == result["changes"]


def test_claims_are_seen_or_not_by_the_intervals_of_their_comparisons(tmp_path: Path) -> None:
    study = Fixed(quick=True)
    result = run_study(study, tmp_path)
    assert result["claims"] == {  # b/long is not part of the quick form
        "a": {"expected": "rises", "found": "rises", "seen": True},
        "b": {"expected": "does not fall", "found": "falls", "seen": False, "margin": 0.02},
    }
    assert not seen("rises", {"low": -0.1, "high": 0.1})["seen"]


@pytest.mark.parametrize(
    ("expected", "low", "high", "said"),
    [
        ("does not rise", -0.1, 0.02, "seen"),
        ("does not rise", -0.1, 0.03, "not decided"),  # it may have risen by more than the margin
        ("does not rise", -0.3, -0.1, "seen"),
        ("does not rise", 0.001, 0.01, "not seen"),
        ("does not fall", -0.02, 0.1, "seen"),
        ("does not fall", -0.03, 0.1, "not decided"),
        ("does not fall", 0.1, 0.3, "seen"),
        ("does not fall", -0.01, -0.001, "not seen"),
        ("rises", -0.1, 0.1, "not seen"),
        ("falls", -0.1, 0.1, "not seen"),
    ],
)
def test_a_wide_interval_does_not_decide_that_nothing_changes(
    expected: str, low: float, high: float, said: str
) -> None:
    assert answer(seen(expected, {"low": low, "high": high})) == said


def test_a_study_has_margins_of_its_own_measures_and_shows_what_is_not_decided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Level(Fixed):
        def claims(self) -> Mapping[str, str]:
            return {"b/long": "does not rise"}

    class Coarse(Level):
        margins = {"score": 1.0}  # noqa: RUF012

    study = Level()
    result = run_study(study, tmp_path)
    assert result["claims"]["b/long"] == {"expected": "does not rise", "found": "level", "seen": None, "margin": 0.02}
    assert json.loads((tmp_path / "results.json").read_text())["claims"]["b/long"]["seen"] is None
    print_result(study, result)
    assert "b/long: expected: does not rise; level (not decided)\n" in capsys.readouterr().out
    ((name, expected, found, shown, said),) = claim_rows(result)[1]
    assert (name, expected, found, said) == ("b/long", "does not rise (margin 0.02)", "level", "not decided")
    assert shown == "+0.500 [+0.000, +1.000]"
    page = (tmp_path / "study.html").read_text()
    assert "".join(f"<td><bdi>{cell}</bdi></td>" for cell in (name, expected, found, shown, said)) in page
    assert run_study(Coarse(), tmp_path)["claims"]["b/long"]["seen"] is True  # of the same finished jobs


def test_the_page_without_claims_has_no_table_of_them(tmp_path: Path) -> None:
    class Open(Fixed):
        def claims(self) -> Mapping[str, str]:
            return {}

    run_study(Open(quick=True), tmp_path)
    assert "Expected and found" not in (tmp_path / "study.html").read_text()


def test_tables_say_what_their_intervals_are_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Fixed()
    result = run_study(study, tmp_path)
    rough = "2 seeds give only a rough idea of their spread"
    assert interval_of(result) == f"intervals (95 %) over records and seeds; {rough}"
    assert interval_of({"seeds": 100}) == "intervals (95 %) over records and seeds"
    one = "intervals (95 %) over records; with one seed they know nothing of other seeds"
    assert interval_of({"seeds": 1}) == one
    print_result(study, result)
    assert interval_of(result) in " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert interval_of(result)[1:] in (tmp_path / "study.html").read_text()


def test_it_says_which_chosen_value_is_an_end_of_what_was_tried() -> None:
    chosen = {"rates": {"a": 0.1, "b": 0.2, "c": None}, "betas": {"a": 0.4}}
    result = {"records": 4, "seeds": 3, "quick": False, "stopped": "", **chosen}
    assert "chosen on other records: a 0.1, b 0.2; so was β: a 0.4" in conditions(result)  # nothing is known of grids
    first, second = [[0.1, 0.7], [0.2, 0.6]], [[0.1, 0.5], [0.2, 0.6], [0.4, 0.5]]
    known = {**result, "tried": {"a": first, "b": second}, "tried_betas": {"a": [[0.2, 0.6], [0.4, 0.7]]}}
    told = "a 0.1 (at an end of its grid), b 0.2; so was β: a 0.4 (at an end of its grid)"
    assert told in conditions(known)
    assert "end" not in conditions({**result, "tried": {}, "tried_betas": {}})  # nothing was chosen


def test_intervals_know_of_seeds_and_untrained_arms_have_one(tmp_path: Path) -> None:
    """Every record changes alike, so that all width is between seeds."""

    class Both(Fixed):
        def comparisons(self) -> Sequence[Compared]:
            return [*super().comparisons(), change("b to a", "score", "b", "a")]

    result = run_study(Both(), tmp_path, seeds=3)
    found = result["changes"]["a"]
    assert found["seeds"] == pytest.approx([1.0, 2.0, 3.0])
    assert (found["low"], found["high"]) == (pytest.approx(1.0), pytest.approx(3.0))
    paired = result["changes"]["b to a"]
    assert (paired["low"], paired["high"]) == (pytest.approx(2.0), pytest.approx(2.0))  # seeds move both arms alike


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.01, 0.2, "rises"), (-0.2, -0.01, "falls"), (-0.1, 0.1, "level"), (0.0, 0.1, "level")]
)
def test_the_whole_interval_decides(low: float, high: float, said: str) -> None:
    assert verdict({"low": low, "high": high}) == said


def test_an_interrupted_study_continues_and_repeats_nothing(tmp_path: Path) -> None:
    broken = Fixed(fails_at="b/long")
    with pytest.raises(RuntimeError, match="stopped"):
        run_study(broken, tmp_path)
    said: list[str] = []
    again = Fixed()
    again.say = said.append
    result = run_study(again, tmp_path)
    assert set(broken.ran).isdisjoint(again.ran)
    assert again.ran[0] == ("b/long", 0, 0.3)
    assert any("finished already and are not done again" in line for line in said)
    whole = run_study(Fixed(), tmp_path.with_name("whole"))
    assert result["changes"] == whole["changes"]
    finished = Fixed()
    assert run_study(finished, tmp_path)["changes"] == result["changes"]
    assert finished.ran == []
    shutil.rmtree(tmp_path / "b" / "seed-1")
    once_more = Fixed()
    run_study(once_more, tmp_path, seeds=3)
    assert once_more.ran == [("b", 1, 0.3), ("a", 2, 0.1), ("b", 2, 0.3), ("b/long", 2, 0.3)]


def test_quick_has_one_seed_no_grid_and_says_so(tmp_path: Path) -> None:
    study = Fixed(quick=True)
    result = run_study(study, tmp_path)
    assert study.ran == [("start", 0, None), ("a", 0, 0.2), ("b", 0, 0.2)]
    assert "quick: one seed" in conditions(result)
    assert "quick: one seed" in (tmp_path / "study.html").read_text()
    assert "b/long" not in result["changes"]
    with pytest.raises(ValueError, match="--quick has one seed, got --seeds 2"):
        run_study(study, tmp_path, seeds=2)


def test_another_setting_in_the_same_folder_is_refused_by_name(tmp_path: Path) -> None:
    run_study(Fixed(quick=True), tmp_path)
    held = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="begun with quick: True, this is quick: False"):
        run_study(Fixed(), tmp_path)
    with pytest.raises(ValueError, match="begun with size: 4, this is size: 5"):
        run_study(Fixed(quick=True, size=5), tmp_path)
    assert sorted(tmp_path.rglob("*")) == held
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match=r"study.json cannot be read .*: choose another --out"):
        run_study(Fixed(quick=True), tmp_path)
    for held_text in ("[1]", '"x"', '{"study": "fixed", "quick": true, "settings": [1]}'):
        (tmp_path / "study.json").write_text(held_text)
        with pytest.raises(ValueError, match=r"was begun with .*choose another --out"):
            run_study(Fixed(quick=True), tmp_path)
    other = tmp_path.with_name("other")
    other.mkdir()
    (other / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no study"):
        run_study(Fixed(), other)


def test_a_setting_within_settings_is_named_alone(tmp_path: Path) -> None:
    described = {"study": "blind", "quick": False, "settings": {"keys": {"data": {"spec": "a"}, "seed": 1}}}
    (tmp_path / "study.json").write_text(json.dumps(described).replace('"a"', '"b"'))
    with pytest.raises(ValueError, match=r"begun with keys\.data\.spec: b, this is keys\.data\.spec: a; choose"):
        check_folder(tmp_path, described)


def test_a_study_has_a_seed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one seed, got 0"):
        run_study(Fixed(), tmp_path / "out", seeds=0)
    assert not (tmp_path / "out").exists()


def test_arms_measured_on_other_records_are_not_compared(tmp_path: Path) -> None:
    run_study(Fixed(quick=True), tmp_path)
    path = tmp_path / "a" / "seed-0" / "rate-0.2" / f"{REPORTED}.jsonl"
    path.write_text(path.read_text().replace("r3", "r4"))
    with pytest.raises(ValueError, match="a, seed 0, was measured on other records than start"):
        run_study(Fixed(quick=True), tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("done.json", "{}"), ("done.json", "["), ("done.json", "[]"), ("reported.jsonl", ""), ("reported.jsonl", '{"id"')],
)
def test_damaged_results_name_the_folder(name: str, text: str, tmp_path: Path) -> None:
    run_study(Fixed(quick=True), tmp_path)
    folder = tmp_path / "a" / "seed-0" / "rate-0.2"
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=r"rate-0\.2: damaged results .*remove this folder"):
        run_study(Fixed(quick=True), tmp_path)
    shutil.rmtree(folder)
    assert run_study(Fixed(quick=True), tmp_path)["arms"]["a"]["score"]["mean"] == pytest.approx(1.0 - 0.1)


def test_every_study_says_what_it_is_and_compares_its_own_arms() -> None:
    for name, kind in zip(STUDIES, all_studies(), strict=True):
        assert kind.about.name == name
        assert all(str(text).strip() for text in kind.about)
        assert kind.about.minutes <= 60
        assert kind.about.quick_minutes <= (11 if name == "reflection" else 5)  # which teaches its model first
        for quick in (False, True):
            study = kind(quick=quick)
            arms = [arm.name for arm in study.arms()]
            assert len({folder_name(arm) for arm in arms}) == len(arms)
            gaps = set(study.differences())
            states = {*arms, *gaps}
            assert {state for c in study.comparisons() for state, _ in (c.before, c.after)} <= states
            assert {arm for plot in study.plots() for line in plot.lines for _, arm in line.points} <= set(arms)
            json.dumps(study.settings())
            compared = [c.name for c in study.comparisons() if {c.before[0], c.after[0]} <= {*_in(study, quick), *gaps}]
            claims = [name for name in study.claims() if name in compared]
            assert claims if quick else claims == list(study.claims())
            assert set(study.claims().values()) <= set(EXPECTED)
            again = pickle.loads(pickle.dumps(study.again()))(say=print)  # as a worker makes it
            assert (type(again), again.quick, again.settings()) == (kind, quick, study.settings())
            pickle.dumps(study.arms())


def _in(study: Study, quick: bool) -> list[str]:
    return [arm.name for arm in study.arms() if arm.quick or not quick]


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastrl", "study", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_list_shows_every_study(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "--list") == 0
    shown = capsys.readouterr().out
    for name in STUDIES:
        about = study_class(name).about
        assert all(text in shown for text in (about.question, about.paper, about.design, about.expected))
    assert run_command(monkeypatch, "--list", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["studies"]] == list(STUDIES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a study"),
        (("juggling",), "blind, "),
        (
            ("perpo-grounding-tiny", "--held-out", "scenes:grounding"),
            "write fastrl study blind --recipe perpo-grounding-tiny --held-out SPEC",
        ),
        (("my.yaml", "--held-out", "scenes:grounding"), "write fastrl study blind --recipe my.yaml"),
        (("blind", "--held-out", "scenes:grounding"), "--held-out goes with --recipe"),
        (("blind", "--set", "optim.steps=1"), "--set goes with --recipe"),
        (("blind", "--recipe", "perpo-grounding-tiny"), "--recipe needs --held-out"),
        (("preference", "--recipe", "perpo-grounding-tiny", "--held-out", "x"), "preference has its own recipes"),
        (("gaze", "--family", "llava"), "--family: gaze has its own recipes and models; blind takes others"),
        (("blind", "--family", "llama"), "unknown family of small models 'llama'; did you mean 'llava'"),
        (
            ("blind", "--family", "llava", "--recipe", "perpo-grounding-tiny", "--held-out", "x"),
            "leave one of them out",
        ),
        (("blind", "--quick", "--seeds", "3"), "--quick has one seed"),
    ],
)
def test_a_wrong_command_is_one_line_that_says_what_to_write(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_command_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastrl.studies.runner.run_study", stop)
    assert run_command(monkeypatch, "blind", "--quick", "--out", str(tmp_path)) == 130
    assert f"the same command continues {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "folder"),
    [((), "study-blind"), (("--family", "qwen2_5_vl"), "study-blind"), (("--family", "llava"), "study-blind-llava")],
)
def test_the_small_model_of_another_family_has_a_folder_of_its_own(
    given: tuple[str, ...], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(study: Study, out: Path, **options: Any) -> dict[str, Any]:
        where.append(out)
        raise KeyboardInterrupt

    where: list[Path] = []
    monkeypatch.setattr("fastrl.studies.runner.run_study", run)
    assert run_command(monkeypatch, "blind", *given) == 130
    assert where == [Path("runs") / folder]
