"""Whole optimizer steps of GRPO, rollouts included: fastrl against TRL's ``GRPOTrainer``, first gradients, then time.

``python -m benchmarks.vs_trl`` uses the GPU if available (a randomly initialised Qwen2.5-VL-3B, trained with adapters
and in full), otherwise the CPU (a model of 6.9 M parameters), and writes ``results/vs-trl-DEVICE.json``. Before any
timing, both sides' gradients of one step from the same sampled tokens must agree: cosine at least 0.9999, norms within
1e-3.

Fairness. Equal on both sides: the model folder, the chat template, the pictures (PNG files, different in every step, so
that no cache helps), prompts and their order, G answers of exactly R tokens (end-of-sequence and special tokens are
never sampled), the reward (fastrl's OCR reward, called as TRL calls any), GRPO with group-normalised advantages, no KL
term, one update per rollout, no pass for old log-probs, entropy computed for the log, sequence-mean loss, PyTorch's
AdamW (fused on a GPU), clipping at norm 1, learning rate 1e-6, no dropout, one process, no worker processes. On a
CPU: float32, no checkpointing. On a GPU: bfloat16 products over float32 trained weights, layers recomputed in the
backward on both sides.

Different, as the subject of the comparison: fastrl preprocesses, encodes, prefills and trains each prompt once per
group; TRL does so once per answer, and preprocesses twice. TRL's head is fused too (neither side stores logits). On a
GPU, TRL has float32 weights and casts them (its default for a model given by name), fastrl has bfloat16 weights and a
float32 copy in the optimizer. TRL generates with transformers' ``generate``, its only option for a multimodal model
without vLLM; on a GPU where vLLM is installed, further cases (``vllm``) let it sample in TRL's process (``colocate``,
0.3 of the memory), with the two sides one after the other. These were never run.

One case has a short text prompt, where sharing saves little. ``equal``: both sides have G answers per micro-batch;
``best``: each side uses its fastest size, determined just before. Steps of the two sides alternate (if both fit in
memory); times are medians. The ratio of a step's seconds is the median over the rounds with its quartiles, each TRL's
step by fastrl's of the same round; that of a phase, of the medians. CPU time is that of the process. Peak: bytes that
persist between steps (weights, optimizer) plus the most that a step allocates beyond them. Ratios are TRL's value
divided by fastrl's.

``trl`` is TRL as shipped. Where a CPU computes a prompt with a picture, ``trl+matmul`` is the same trainer after one
change that a user who looks into a profile would make: patches embedded by a product of matrices, as fastrl does,
instead of a convolution. Its steps alternate with the others, on the same records.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import QUIET, Others, busy_before, notice, pin_or_exit
from benchmarks.measure import spread, unsteady
from benchmarks.run import RESULTS, default_device, environment
from benchmarks.versus.gradients import GradientMismatch, compare
from benchmarks.versus.measure import PHASES, Recorder
from benchmarks.versus.model import build_folder
from benchmarks.versus.ours import Fastrl
from benchmarks.versus.theirs import Trl, colocated
from benchmarks.versus.work import GOAL, Work, make_records, works
from fastrl.data.records import Record
from fastrl.models.load import load_tokenizer

FAIRNESS = (__doc__ or "").split("Fairness. ", 1)[1].strip()
ROWS = ("seconds", "cpu_seconds", *PHASES, "peak_bytes", "flops")


class Bench:
    """The comparisons of one model folder on one device."""

    def __init__(self, folder: Path, pictures: Path, device: torch.device, rounds: int) -> None:
        self.folder, self.pictures, self.device, self.rounds = folder, pictures, device, rounds
        self._measured: dict[tuple[Any, ...], dict[str, Any]] = {}

    def case(self, work: Work, train: str, micro_batch: str) -> dict[str, Any]:
        """Both sides at an equal micro-batch, each at its best, or (``vllm``) TRL with vLLM in its process."""
        rows = {"fastrl": work.group, "trl": work.group}
        tried = None
        if micro_batch == "best":
            tried = {name: self._try_out(name, work, train) for name in rows}
            rows = {name: min(times, key=times.__getitem__) for name, times in tried.items() if times}
        row = {"work": asdict(work), "train": train, "micro_batch": micro_batch, "rows": rows, "tried": tried}
        vllm = micro_batch == "vllm"  # keeps memory of its own, so that the sides take turns
        together = self.device.type == "cpu" or (train == "lora" and not vllm)
        key = (work.name, train, vllm, *rows.values())
        if key not in self._measured:  # the best sizes may be equal, and so already measured
            kinds = ["warm", *["time"] * self.rounds, "count"]
            measure = self._in_turn if together else self._one_by_one
            others = Others()
            sides = measure(work, train, rows, kinds, **self._options(work, vllm))
            found: dict[str, Any] = {"busy": others.busy(), "sides": sides, "ratio": ratios(sides)}
            if "trl+matmul" in sides:
                found["ratio_matmul"] = ratios(sides, "trl+matmul")
            self._measured[key] = found
        return row | {"interleaved": together} | self._measured[key]

    def _options(self, work: Work, vllm: bool) -> dict[str, Any]:
        """Further arguments of TRL's side."""
        if vllm:
            return colocated(work, load_tokenizer(self.folder))
        return {"both": self.device.type == "cpu" and work.picture > 0}

    def _in_turn(
        self, work: Work, train: str, rows: dict[str, int], kinds: Sequence[str], **options: Any
    ) -> dict[str, Any]:
        try:
            ours = self._ours(work, train, rows["fastrl"], len(kinds))
            theirs = self._theirs(work, train, rows["trl"], len(kinds), **options)
            theirs.run(kinds, progress(ours.step, kinds))
        except torch.OutOfMemoryError as error:
            return {name: _out_of_memory(error) for name in rows}
        sides = {"fastrl": self._summary(ours, work), "trl": self._summary(theirs, work)}
        if theirs.matmul is not None:
            sides["trl+matmul"] = summary(theirs.matmul, theirs.static_bytes, work)
        return sides

    def _one_by_one(
        self, work: Work, train: str, rows: dict[str, int], kinds: Sequence[str], **options: Any
    ) -> dict[str, Any]:
        sides = {}
        for name in rows:
            try:
                side = self._alone(name, work, train, rows[name], kinds, **options)
                sides[name] = self._summary(side, work)
            except torch.OutOfMemoryError as error:
                sides[name] = _out_of_memory(error)
            side = None
            self.free()
        return sides

    def _alone(
        self, name: str, work: Work, train: str, rows: int, kinds: Sequence[str], **options: Any
    ) -> Fastrl | Trl:
        if name == "fastrl":
            ours = self._ours(work, train, rows, len(kinds))
            step = progress(ours.step, kinds)
            for kind in kinds:
                step(kind)
            return ours
        theirs = self._theirs(work, train, rows, len(kinds), **options)
        theirs.run(kinds, progress(lambda _: None, kinds))
        return theirs

    def _try_out(self, name: str, work: Work, train: str) -> dict[int, float]:
        """Seconds of one step by micro-batch size, without sizes that do not fit."""
        sizes = [work.group * n for n in (1, 2, 4, 8) if work.prompts % n == 0]
        found: dict[int, float] = {}
        for rows in sizes if name == "fastrl" else [work.group // 2, *sizes]:
            try:
                side = self._alone(name, work, train, rows, ("warm", "time"))
                found[rows] = side.recorder.seconds[0]
            except torch.OutOfMemoryError:
                pass
            side = None
            self.free()
        return found

    def _ours(self, work: Work, train: str, rows: int, steps: int) -> Fastrl:
        return Fastrl(self.folder, work, rows, self._records(work, steps), train=train, device=self.device)

    def _theirs(self, work: Work, train: str, rows: int, steps: int, **options: Any) -> Trl:
        return Trl(self.folder, work, rows, self._records(work, steps), train=train, device=self.device, **options)

    def _records(self, work: Work, steps: int) -> list[Record]:
        return make_records(work, work.prompts * steps, self.pictures / str(work.picture), load_tokenizer(self.folder))

    def _summary(self, side: Fastrl | Trl, work: Work) -> dict[str, Any]:
        row = summary(side.recorder, side.static_bytes, work)
        return row | ({"sampler_gap": _gap(side.gaps)} if isinstance(side, Fastrl) else {})

    def free(self) -> None:
        """Free the memory of the last case."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _out_of_memory(error: torch.OutOfMemoryError) -> dict[str, Any]:
    return {"error": f"out of memory: {error}".splitlines()[0]}


def summary(recorder: Recorder, static: int, work: Work) -> dict[str, Any]:
    """One side's results of one case: medians over the timed steps."""
    seconds = statistics.median(recorder.seconds)
    phases = {name: statistics.median([step.get(name, 0.0) for step in recorder.by_phase]) for name in PHASES}
    answers = work.rows * work.answer
    row = {
        "seconds": seconds,
        "seconds_spread": spread(recorder.seconds),
        "all_seconds": recorder.seconds,
        "cpu_seconds": statistics.median(recorder.cpu_seconds),
        "phases": phases,
        "answer_tokens_per_s": answers / seconds,
        "generated_tokens_per_s": answers / phases["generate"],
        "static_bytes": static,
        "flops": recorder.flops,
    }
    if recorder.step_bytes is not None:
        row |= {"step_bytes": recorder.step_bytes, "peak_bytes": static + recorder.step_bytes}
    return row


def ratios(sides: dict[str, Any], other: str = "trl") -> dict[str, Any]:
    """The other side's value divided by fastrl's, for every value that both have; of seconds also the quartiles."""
    ours, theirs = ({**side, **side.get("phases", {})} for side in (sides["fastrl"], sides[other]))
    found: dict[str, Any] = {name: theirs[name] / ours[name] for name in ROWS if ours.get(name) and theirs.get(name)}
    pairs = list(zip(theirs.get("all_seconds", ()), ours.get("all_seconds", ()), strict=False))
    if pairs:
        found["spread"] = spread([a / b for a, b in pairs])
        found["seconds"] = found["spread"]["median"]
    return found


def progress(step: Callable[[str], None], kinds: Sequence[str]) -> Callable[[str], None]:
    """``step``, which says on stderr how many of the rounds are done."""
    done = 0

    def said(kind: str) -> None:
        nonlocal done
        step(kind)
        done += 1
        print(f"  round {done} of {len(kinds)}, {kind}", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr)

    return said


def _gap(gaps: list[dict[str, float]]) -> dict[str, float]:
    """Largest difference of any step between the sampler's and the trainer's log-probs."""
    return {key: max(gap[key] for gap in gaps) for key in (gaps[0] if gaps else {})}


def line(case: dict[str, Any]) -> list[str]:
    """The printed lines of a case."""
    title = f"{case['work']['name']}, {case['train']}, {case['micro_batch']} micro-batch {case['rows']}"
    if case.get("busy") is not None and case["busy"] > QUIET:
        title += f", BUSY: others took {case['busy']:.2f} cores"
    out = [title]
    for name, side in case["sides"].items():
        if "error" in side:
            out.append(f"  {name:10} {side['error']}")
            continue
        phases = " ".join(f"{phase} {side['phases'][phase]:.3f}" for phase in PHASES)
        peak = f"{side['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in side else ""
        total = f"{side['seconds']:8.3f} s{_quartiles(side.get('seconds_spread'))} ({side['cpu_seconds']:.3f} s of CPU)"
        out.append(f"  {name:10} {total} = {phases}; {peak}, {side['flops'] / 1e9:.1f} GFLOP")
    for key, name in (("ratio", "ratio"), ("ratio_matmul", "  matmul")):
        if key in case:
            values = ", ".join(f"{row} {case[key][row]:.2f}" for row in ROWS if row in case[key])
            out.append(f"  {name:10} step{_quartiles(case[key].get('spread'))}: {values}")
    return out


def _quartiles(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f" [{found['q1']:.3f}, {found['q3']:.3f}]{'!' if unsteady(found) else ''}"


def plan(size: str, trains: Sequence[str], only: str, best: bool) -> list[tuple[Work, str, str]]:
    """(work, what is trained, micro-batch) of every case, the most informative first."""
    found = [(work, train, "equal") for work in works(size) for train in trains]
    if size != "small" and importlib.util.find_spec("vllm") is not None:
        found += [(work, train, "vllm") for work in works(size) for train in trains]
    if best:
        found += [(work, train, "best") for work in works(size) if work.prompts > 1 for train in trains]
    return [case for case in found if only in f"{case[0].name} {case[1]} {case[2]}"]


def _write(report: dict[str, Any], target: Path | None) -> None:
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Compare, print and write; returns 1 if the gradients differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vs_trl", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[the GPU if available]")
    parser.add_argument("--train", nargs="+", choices=("full", "lora"), help="[cpu: full; cuda: lora full]")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose 'name train micro-batch' contains this")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps per side [7]")
    parser.add_argument("--no-best", action="store_true", help="equal micro-batches only")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="folder of built models, reused if present [temporary]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="[results/vs-trl-DEVICE.json; with --only: none]")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch, on as many cores [all]")
    args = parser.parse_args(argv)
    pin_or_exit(parser, args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device(args.device) if args.device else default_device()
    size, trains = ("3b", ["lora", "full"]) if device.type == "cuda" else ("small", ["full"])
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        parser.error("TRL would use all GPUs: set CUDA_VISIBLE_DEVICES to a single one")
    chosen = plan(size, args.train or trains, args.only, not args.no_best)
    if not chosen:
        parser.error(f"no case matches {args.only!r}")
    busy = busy_before()
    print(notice(busy))
    report: dict[str, Any] = environment(device) | {
        "busy": busy,
        "fairness": FAIRNESS,
        "gradients": [],
        "cases": [],
        "not_run": [],
    }
    target = args.json
    if target is None and not args.only:
        target = RESULTS / f"vs-trl-{re.sub(r'[^a-z0-9]+', '-', report['device']['name'].lower()).strip('-')}.json"
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        small = build_folder("small", root / "small", device)
        try:
            for train in args.train or trains:
                found = compare(small, GOAL, root / "gradients", train=train, device=device)
                report["gradients"].append(found)
                print(f"gradients, {train}: cosine {found['cosine']:.9f}, norm ratio {found['norm_ratio']:.7f}")
        except GradientMismatch as error:
            print(error, file=sys.stderr)
            return 1
        _write(report, target)  # from here on, an interrupted run leaves its results
        bench = Bench(build_folder(size, root / size, device), root / "pictures", device, args.rounds)
        bench.free()
        for work, train, micro_batch in chosen:
            if time.monotonic() - begin > args.seconds:
                report["not_run"].append(f"{work.name}, {train}, {micro_batch}")
                continue
            report["cases"].append(bench.case(work, train, micro_batch))
            print("\n".join(line(report["cases"][-1])), flush=True)
            bench.free()
            _write(report, target)
    if target is not None:
        _write(report, target)
        print(f"wrote {target} after {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
