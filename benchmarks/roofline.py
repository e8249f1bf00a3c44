"""``python -m benchmarks.roofline``: lower bounds for the time of each kernel on H100 and H200, without a GPU.

Each call is compiled as on an H100 and its PTX is run by the interpreter in ``tests/ptx``, which counts instructions
and bytes. The SASS gives the number of issued instructions (``machine_code``); registers and shared memory give the
number of programs that fit on a multiprocessor. Work that is linear in the batch is run at two small batches and
extrapolated to the size in the table. Writes ``results/roofline.json`` and the table of docs/kernels.md. Nothing is
measured: times are lower bounds, without latency.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.machine_code import disassemble, issued
from benchmarks.table import embed as place

RESULTS = Path(__file__).parent / "results" / "roofline.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"

MULTIPROCESSORS, SCHEDULERS = 132, 4
CLOCK = 1.755e9  # Hz, sustained under load
SPECIAL_LANES = 16  # special functions per multiprocessor and cycle
REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 233472, 64, 32  # of a multiprocessor; 1 KB of SHARED goes to each program
BANDWIDTH = {"H100": 3.35e12 * 0.9, "H200": 4.8e12 * 0.9}  # bytes/s: 90 % of the data sheet's
LAUNCH = 3e-6  # s: overhead of a launch, which dominates shorter kernels


class Problem(NamedTuple):
    """A public call at a realistic size."""

    name: str
    size: str  # as shown in the table
    call: Callable[[int], Any]  # of a batch
    batch: int
    probes: tuple[int, int] | None  # two batches to run if the work is linear in the batch; None: run at full size
    arch: int = 90


class Work(NamedTuple):
    """Counts of one kernel launch, over all programs."""

    kernel: str
    programs: float
    warps: int
    registers: int
    stack: int
    shared: int
    bytes: float  # distinct bytes read, plus bytes written
    instructions: float  # warp instructions
    special: float
    paired: bool


def works(problem: Problem) -> list[Work]:
    """The launches of a problem, in order."""
    if problem.probes is None:
        return _run(problem, problem.batch)
    few, many = problem.probes
    low, high = _run(problem, few), _run(problem, many)
    step = (problem.batch - many) / (many - few)
    return [_extend(a, b, step) for a, b in zip(low, high, strict=True)]


def _extend(low: Work, high: Work, step: float) -> Work:
    grown = {
        name: getattr(high, name) + step * (getattr(high, name) - getattr(low, name))
        for name in ("programs", "bytes", "instructions", "special")
    }
    return high._replace(**grown)


def _run(problem: Problem, batch: int) -> list[Work]:
    from tests.ptx.launch import run_ptx

    torch.manual_seed(0)
    with run_ptx(problem.arch) as launches:
        problem.call(batch)
    return [_work(launch) for launch in launches]


def _work(launch: Any) -> Work:
    kernel = launch.prepared.kernel
    opcodes = [instruction.opcode for instruction in kernel.instructions]
    jumps = [
        (at, kernel.labels[str(instruction.operands[0])])
        for at, instruction in enumerate(kernel.instructions)
        if instruction.opcode.startswith("bra")
    ]
    sass, registers, stack = disassemble(launch.compiled.asm["cubin"])
    found = issued(opcodes, jumps, launch.counts.executed, sass)
    x, y, z = launch.grid
    return Work(
        kernel=launch.name,
        programs=x * y * z,
        warps=launch.warps,
        registers=registers,
        stack=stack,
        shared=launch.compiled.metadata.shared,
        bytes=sum(launch.counts.distinct),
        instructions=found.instructions,
        special=found.special,
        paired=found.paired,
    )


def resident(warps: int, registers: int, shared: int) -> int:
    """Programs that fit on a multiprocessor of sm_90 at once (registers are allocated per warp in units of 256)."""
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // of_warp // SCHEDULERS * SCHEDULERS // warps
    by_shared = SHARED // (-(-shared // 128) * 128 + 1024)
    return min(by_registers, by_shared, WARPS // warps, PROGRAMS)


def bounds(row: dict[str, Any]) -> dict[str, float]:
    """Lower bounds in seconds of a row, by resource: instruction slots, special functions, bytes on either GPU.

    Programs are spread evenly; the busiest multiprocessor decides, and each warp uses one of its schedulers.
    """
    per_processor = math.ceil(row["programs"] / MULTIPROCESSORS)
    slots = CLOCK * min(SCHEDULERS, row["warps"] * per_processor) * row["programs"] / per_processor
    special = row["special"] * 32 * SCHEDULERS / SPECIAL_LANES / slots
    return {
        "issue": row["instructions"] / slots,
        "special": special,
        **{gpu: row["bytes"] / rate for gpu, rate in BANDWIDTH.items()},
    }


def limit(found: dict[str, float], gpu: str) -> str:
    """The limiting resource of a launch on a GPU; ``launch`` if it is shorter than the launch overhead."""
    least = {"issue": found["issue"], "special": found["special"], "bytes": found[gpu]}
    name = max(least, key=lambda key: least[key])
    return "launch" if least[name] < LAUNCH else name


def table(payload: dict[str, Any]) -> str:
    """Markdown table with a line per kernel of each problem."""
    head = ["kernel", "size", "programs × warps", "registers", "shared", "warps of 64", "waves", "MB", "instructions"]
    head += ["issue µs", "special µs", "bytes µs H100", "H200", "bound H100", "H200"]
    lines = [" | ".join(head), " | ".join(["---", "---", *["--:"] * (len(head) - 4), "---", "---"])]
    for row in payload["kernels"]:
        found, programs = bounds(row), resident(row["warps"], row["registers"], row["shared"])
        cells = [
            f"`{row['kernel']}`" + ("" if row["arch"] == 90 else f" (sm_{row['arch']} code)"),
            row["size"],
            f"{row['programs']:.0f} × {row['warps']}",
            str(row["registers"]) + (f" + {row['stack']} B" if row["stack"] else ""),
            str(row["shared"]),
            str(programs * row["warps"]),
            f"{row['programs'] / (MULTIPROCESSORS * programs):.2g}",
            _short(row["bytes"] / 1e6),
            ("" if row["paired"] else "PTX ") + _millions(row["instructions"]),
            *(_short(found[name] * 1e6) for name in ("issue", "special", "H100", "H200")),
            *(limit(found, gpu) for gpu in BANDWIDTH),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _millions(value: float) -> str:
    return (
        f"{_short(value / 1e6)} M" if value >= 1e6 else f"{_short(value / 1e3)} K" if value >= 1e3 else f"{value:.0f}"
    )


def embed(document: str, payload: dict[str, Any]) -> str:
    """The document with the table between its marks. Raises ``ValueError`` if they are missing."""
    return place(document, BEGIN, END, f"{table(payload)}\n\nComputed, Triton {payload['triton']}.")


# ---- problems --------------------------------------------------------------------------------------------------------


def problems() -> list[Problem]:
    """The library's kernels at realistic sizes; bf16 for values from a model."""
    rows = (2, 4)
    return [
        Problem("token_logprob", "8192 × 151936 bf16", lambda n: _tokens(n, entropy=False), 8192, rows),
        Problem("token_logprob, entropy", "the same, entropy", lambda n: _tokens(n, entropy=True), 8192, rows),
        Problem("cross_entropy", "the same, labels smoothed by 0.1, z-loss", _classes, 8192, rows),
        Problem("token_logprob, 20 targets", "the same, 20 targets a row", _several, 8192, rows),
        Problem("policy_loss", "16384 tokens", _policy, 16384, (1024, 2048)),
        Problem("unlikelihood_loss", "16384 tokens", _unlikelihood, 16384, (1024, 2048)),
        Problem("group_advantage", "512 rewards, groups of 8", _advantage, 64, None),
        Problem("perpo", "64 lists of 16, PerPO", lambda n: _lists(n, "perpo"), 64, None),
        Problem("listmle", "64 lists of 16, ListMLE", lambda n: _lists(n, "listmle"), 64, None),
        Problem("pairwise_iou", "64 × 304 × 96, GIoU", _boxes, 64, (1, 2)),
        Problem("linear_assignment", "64 × 300 × 96", _assignment, 64, (4, 8)),
        Problem("detection_reward", "512 × 32 × 32", _detection, 512, (8, 16)),
        Problem(
            "decode_attention",
            "8 × 8 rows, prompts of 1200, own keys 256, 16/2 heads of 128, bf16",
            _decode,
            8,
            None,
            80,
        ),
        Problem("add_rms_norm", "64 × 2048 bf16", _norm, 64, (8, 16)),
        Problem("rope_append", "64 rows, 16 + 2 heads of 128, bf16", _rope, 64, (8, 16)),
        Problem("silu_mul", "64 × 11008 bf16", _gate, 64, (8, 16)),
        Problem(
            "prefix_attention", "prompt of 1000, 8 answers of 64, keys and values of 2 heads of 128, bf16",
            _prefix, 8, None,
        ),
        Problem(
            "lora_update, q, k, v", "64 × 2048 to 2048, 256 and 256, rank 16, bf16",
            lambda n: _adapters(n, (2048, 256, 256)), 64, None, 80,
        ),
        Problem(
            "lora_update, gate and up", "64 × 2048 to 2 × 11008, rank 16, bf16",
            lambda n: _adapters(n, (11008, 11008)), 64, None, 80,
        ),
    ]  # fmt: skip


def _tokens(rows: int, *, entropy: bool) -> None:
    from fastrl_kernels import token_logprob

    logits = torch.randn(rows, 151936).bfloat16().requires_grad_()
    out = token_logprob(logits, torch.randint(151936, (rows,)), return_entropy=entropy)
    (out.logp.sum() + (0 if out.entropy is None else out.entropy.sum())).backward()


def _classes(rows: int) -> None:
    from fastrl_kernels import cross_entropy

    logits = torch.randn(rows, 151936).bfloat16().requires_grad_()
    cross_entropy(logits, torch.randint(151936, (rows,)), label_smoothing=0.1, z_loss=1e-4).backward()


def _several(rows: int) -> None:
    from fastrl_kernels import token_logprob

    logits = torch.randn(rows, 151936).bfloat16().requires_grad_()
    token_logprob(logits, torch.randint(151936, (rows, 20))).logp.sum().backward()


def _policy(tokens: int) -> None:
    from fastrl_kernels import policy_loss

    logp = -torch.rand(tokens)
    ids = torch.arange(tokens) // 128
    policy_loss(logp, torch.randn(128), ids, old_logp=logp, ref_logp=logp, weight=torch.ones(tokens), beta=0.04)


def _unlikelihood(tokens: int) -> None:
    from fastrl_kernels import unlikelihood_loss

    unlikelihood_loss(-torch.rand(tokens), torch.rand(tokens), weight=torch.ones(tokens))


def _advantage(groups: int) -> None:
    from fastrl_kernels import group_advantage

    group_advantage(torch.rand(groups * 8), 8)


def _lists(lists: int, kind: str) -> None:
    from fastrl_kernels import listwise_loss

    listwise_loss(torch.randn(lists, 16), torch.rand(lists, 16), kind=kind)


def _boxes(problems: int) -> None:
    from fastrl_kernels import pairwise_iou

    a, b = (torch.rand(problems, n, 4, requires_grad=True) for n in (304, 96))
    pairwise_iou(a, b, kind="giou").sum().backward()


def _assignment(problems: int) -> None:
    from fastrl_kernels import linear_assignment

    linear_assignment(torch.rand(problems, 300, 96))


def _detection(problems: int) -> None:
    from fastrl_kernels import detection_reward

    corner = torch.rand(problems, 32, 2)
    truth = torch.cat([corner, corner + 0.2], -1)
    found = truth + 0.02 * torch.randn_like(truth)
    count = torch.full((problems,), 32)
    detection_reward(found, truth, count, count)


def _decode(prompts: int) -> None:
    from fastrl_kernels import decode_attention

    module = importlib.import_module("fastrl_kernels.decode_attention")
    q = torch.randn(prompts * 8, 16, 128).bfloat16()
    prompt = torch.randn(2, prompts, 2, 1200, 128).bfloat16().unbind()
    own_keys = torch.randn(2, prompts * 8, 2, 256, 128).bfloat16().unbind()
    with mock.patch.object(module, "processors", return_value=MULTIPROCESSORS):
        decode_attention(q, *prompt, *own_keys)


def _norm(rows: int) -> None:
    from fastrl_kernels import add_rms_norm

    residual, x, weight = (torch.randn(*shape, 2048).bfloat16() for shape in ((rows,), (rows,), ()))
    add_rms_norm(residual, x, weight, 1e-6)


def _rope(rows: int) -> None:
    from fastrl_kernels import rope_append

    q, k, v = (torch.randn(rows, heads, 128).bfloat16() for heads in (16, 2, 2))
    cos, sin = torch.randn(2, rows, 64).unbind()
    keys, values = torch.zeros(2, rows, 2, 16, 128).bfloat16().unbind()
    rope_append(q, k, v, cos, sin, keys, values, torch.tensor([3]))


def _gate(rows: int) -> None:
    from fastrl_kernels import silu_mul

    silu_mul(*torch.randn(2, rows, 11008).bfloat16().unbind())


def _prefix(answers: int) -> None:
    """Its two kernels, the gather and the sum of its gradients; attention itself is a library's."""
    from fastrl_kernels import prefix_attention

    lengths = {"prompt_lengths": [1000], "completion_lengths": [64] * answers, "group_of_completion": [0] * answers}
    q, k, v = (torch.randn(1000 + 64 * answers, 2, 128).bfloat16().requires_grad_() for _ in range(3))
    out = prefix_attention(q, k, v, **lengths)
    out.backward(torch.ones_like(out))


def _adapters(rows: int, sizes: tuple[int, ...]) -> None:
    from fastrl_kernels import lora_update

    rank, width = 16, 2048
    low = torch.randn(len(sizes) * rank, width).bfloat16()
    highs = [torch.randn(size, rank).bfloat16() for size in sizes]
    lora_update(torch.randn(rows, width).bfloat16(), low, highs, [torch.zeros(rows, n).bfloat16() for n in sizes], 2.0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose name contains this; not written")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--document", type=Path, default=DOCUMENT, metavar="FILE")
    args = parser.parse_args(argv)
    import triton

    rows = []
    for problem in problems():
        if args.only in problem.name:
            for work in works(problem):
                rows.append({"problem": problem.name, "size": problem.size, "arch": problem.arch, **work._asdict()})
                print(rows[-1], flush=True)
    payload = {"triton": triton.__version__, "kernels": rows}
    if not args.only:
        args.json.write_text(json.dumps(payload, indent=1) + "\n")
        args.document.write_text(embed(args.document.read_text(), payload))
    print(table(payload))


if __name__ == "__main__":
    main()
