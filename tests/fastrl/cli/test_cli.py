"""The command line: help texts, results as JSON, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastrl.cli import doctor
from fastrl.cli.main import main


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def fastrl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Done]:
    """Run the command in this process, from an empty folder (a new process would spend ten seconds on imports)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["fastrl", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        out = capsys.readouterr()
        return Done(code if isinstance(code, int) else int(code is not None), out.out, out.err)

    return run


def test_eval_of_predictions_prints_one_json_object(fastrl: Callable[..., Done], tmp_path: Path) -> None:
    from fastrl.data import load_data

    rows = []
    for record in load_data("scenes:grounding?n=4&seed=9"):
        x1, y1, x2, y2 = record.target["box"]
        rows.append({"id": record.id, "answer": f'[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}]}}]'})
    rows[3]["answer"] = "no idea"
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = fastrl(
        "eval", "grounding", "--data", "scenes:grounding?n=4&seed=9", "--predictions", str(answers), "--json",
        "--out", str(tmp_path / "scored.jsonl"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["n"] == 4
    assert metrics["unparsable"] == 1
    assert metrics["mean_iou"] == pytest.approx(0.75)
    assert metrics["acc@0.95"] == pytest.approx(0.75)
    assert len((tmp_path / "scored.jsonl").read_text().splitlines()) == 4
    common = ("eval", "grounding", "--data", "scenes:grounding?n=4&seed=9", "--predictions", str(answers), "--json")
    few = json.loads(fastrl(*common, "--limit", "2").stdout.splitlines()[-1])
    assert (few["n"], few["mean_iou"]) == (2, pytest.approx(1.0))
    small = json.loads(fastrl(*common, "--frame", "resized", "--max-pixels", "3136").stdout.splitlines()[-1])
    assert small["mean_iou"] < 0.5  # these pictures were not seen at 56 x 56
    assert "go with --model, or with --frame resized" in fastrl(*common, "--min-pixels", "3136").stderr
    assert "is more than" in fastrl(*common, "--frame", "resized", "--min-pixels", "99999", "--max-pixels", "9").stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [(("train",), "[runs/NAME]"), (("build", "perpo"), "[grounding 20, ocr 5]"), (("tpl",), "[beside")],
)
def test_help_says_the_defaults(fastrl: Callable[..., Done], command: tuple[str, ...], message: str) -> None:
    assert message in fastrl(*command, "--help").stdout


def test_tpl_prints_a_line_per_record_or_json(fastrl: Callable[..., Done], tiny_folder: Callable[[str], Path]) -> None:
    arguments = ("tpl", "--model", str(tiny_folder("qwen2_5")), "--data", "scenes:shown?n=2&size=56&frames=2")
    done = fastrl(*arguments, "--single", "last")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shown-0-") == 2
    done = fastrl(*arguments, "--samples", "1", "--form", "ppl", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["n"] == 2
    assert Path(result["plot"]) == Path("runs/tpl-shown.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tpl", "--model", "x", "--data", "scenes:shown?n=1", "--keep-top", "0.5"), "--keep-top needs --out"),
        (("tpl", "--model", "tiny:perception", "--data", "scenes:shown?n=1", "--single", "frist"), "mean 'first'"),
        (("eval", "groundin", "--data", "scenes:grounding?n=1", "--model", "x"), "did you mean 'grounding'"),
        (("eval", "grounding", "--data", "scenes:grounding?n=1"), "either --model or --predictions"),
        (("eval", "grounding", "--data", "scene:grounding?n=1", "--model", "tiny:perception"), "scenes"),
        (("eval", "grounding", "--data", "rows.jsonl", "--model", "tiny:perception"), "names no adapter"),
        (
            ("train", "perception-r1-counting-tiny", "--data", "scenes:grounding?n=1", "--out", "runs/never"),
            "take a grounding recipe",
        ),
        (
            ("eval", "grounding", "--data", "scenes:grounding?n=1", "--model", "missing-folder"),
            "model folder not found",
        ),
        (("train", "perception-r1-groundin-tiny"), "did you mean perception-r1-grounding-tiny"),
        (("train", "perception-r1-grounding-tiny", "--set", "optim.step=3"), "did you mean optim.steps"),
        (("demo", "--method", "grpo"), "perception-r1"),
        (("demo", "--task", "juggling"), "grounding"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(
    fastrl: Callable[..., Done], arguments: tuple[str, ...], message: str
) -> None:
    done = fastrl(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frame", "thosand"), "thosand"),
        (("--frame", "original"), "--frame says what the coordinates of --predictions mean"),
        (("--limit", "-1"), "--limit"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--out", "a-file/x.jsonl"), "a-file"),
    ],
)
def test_eval_refuses_what_it_cannot_do_before_it_begins(
    fastrl: Callable[..., Done], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "a-file").write_text("")
    done = fastrl("eval", "grounding", "--data", "scenes:grounding?n=2", "--model", str(tmp_path / "no"), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "model folder" not in done.stderr


def test_a_folder_that_cannot_be_written_is_named(fastrl: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    for out in ("a-file", "a-file/run"):
        done = fastrl("train", "perception-r1-grounding-tiny", "--out", out, "--set", "optim.steps=1")
        assert done.returncode == 2
        assert done.stderr.startswith("error: a-file")


def test_a_report_of_a_broken_log_counts_what_it_left_out(fastrl: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n[1]\n{"step": 2}\n')
    done = fastrl("report", "run")
    assert done.returncode == 0, done.stderr
    assert "Left out: 1 of the lines of metrics.jsonl" in (tmp_path / "run" / "report.html").read_text()


def test_doctor_reports_every_public_kernel() -> None:
    import fastrl_kernels

    found = doctor.report()
    assert set(found["kernels"]) == {n for n in fastrl_kernels.__all__ if n.islower()}
    assert all(found["kernels"].values())
    assert found["versions"]["torch"]
    assert {"bfloat16", "float32", "variable length"} <= set(found["attention"])
    if not torch.cuda.is_available():
        assert found["attention"]["bfloat16"].startswith("no GPU: scaled-dot-product attention")
    assert {"flash_attn", "varlen_attn", "liger_kernel", "deepspeed"} <= set(found["optional"])


def test_doctor_prints_versions_and_json(fastrl: Callable[..., Done]) -> None:
    done = fastrl("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["versions"]["fastrl"]
    assert found["memory"]["allocator"] == "PYTORCH_ALLOC_CONF=expandable_segments:True"  # as the command set it


@pytest.mark.parametrize("module", ["fastrl", "fastrl_kernels"])
def test_imports_are_light(module: str) -> None:
    """Importing the package imports no heavy library and takes little more time than importing torch."""
    code = (
        "import sys, torch; before = set(sys.modules); import " + module + "; "
        "new = set(sys.modules) - before; "
        "bad = {'transformers', 'peft', 'matplotlib', 'datasets', 'scipy', 'PIL', 'typer'} & new; "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_kernels_work_without_triton(tmp_path: Path) -> None:
    """Without Triton, CPU tensors use the eager or the C++ path."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('not installed')\n")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import fastrl_kernels as k; "
        "from fastrl_kernels._triton import HAS_TRITON; assert not HAS_TRITON; "
        "h = torch.randn(5, 8, requires_grad=True); "
        "out = k.linear_logprob(h, torch.randn(11, 8), torch.arange(5)); out.logp.sum().backward(); "
        "assert h.grad is not None; "
        "assert k.linear_assignment(torch.eye(3)[None]).total.item() == 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_reper_from_dialogues_to_reflection(fastrl: Callable[..., Done], tmp_path: Path) -> None:
    model = ("--model", "tiny:language", "--max-new-tokens", "48")
    built = fastrl(
        "build", "reper", *model, "--critic", "rule", "--data", "scenes:caption?n=24&seed=1", "--temperatures",
        "0,0.7,1.4", "--out", "d.jsonl", "--json",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout.splitlines()[-1])["kept"] > 2
    small = ("optim.steps=2", "data.prompts_per_step=2", "log.tensorboard=false")
    keys = [part for key in small for part in ("--set", key)]
    trained = fastrl("train", "reper-caption-tiny", "--data", "reflection:d.jsonl", "--out", "run", *keys)
    assert trained.returncode == 0, trained.stderr
    scored = fastrl(
        "eval", "caption", "--model", "run/model", "--data", "scenes:caption?n=2&seed=2", "--reflect", "2",
        "--max-new-tokens", "48", "--attention", "looks", "--json",
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    metrics = json.loads(scored.stdout.splitlines()[-1])
    assert {"turn1/score", "turn2/chair_i", "turn2/object_recall", "turn2/image_attention"} <= set(metrics)
    assert (tmp_path / "looks" / "attention.png").is_file()
    picture = str(next((tmp_path / "d.images").iterdir()))
    gone = "http:http://127.0.0.1:9/v1?retries=0&timeout=0.5"
    done = fastrl("reflect", *model, "--critic", gone, "--image", picture)
    assert done.returncode == 1
    assert "the critic failed at turn 1" in done.stdout
    assert "best answer so far: A " in done.stdout
    assert "turn 2" not in done.stdout
    refused = fastrl("eval", "ocr", *model, "--data", "scenes:ocr?n=1", "--attention", "looks")
    assert refused.returncode == 2
    assert "--reflect" in refused.stderr
