"""The computed roofline: pairing of loops, occupancy, bounds, and that the document shows what the JSON holds."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from benchmarks import machine_code, roofline
from fastrl_kernels._common import interpreting
from fastrl_kernels._triton import HAS_TRITON

PTX = ["mov", "ld", "ex2.approx.f32", "add", "bra", "st", "bra", "ret"]
JUMPS = [(4, 2), (6, 1)]
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, [R4] ;
        /*0020*/                   MUFU.EX2 R3, R2 ;
        /*0030*/                   FADD R3, R3, R2 ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/                   STG.E [R4], R3 ;
        /*0060*/                   IADD3 R4, R4, 0x4, RZ ;
        /*0070*/               @P1 BRA 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   NOP;
"""


def test_loops_are_paired_and_counted_with_their_own_length() -> None:
    executed = Counter({0: 1, 1: 10, 2: 50, 3: 50, 4: 50, 5: 10, 6: 10, 7: 1})
    found = machine_code.issued(PTX, JUMPS, executed, SASS)
    # outside: MOV, EXIT and the padding's branch; the outer loop: LDG, STG, IADD3, BRA; the inner one: MUFU, FADD, BRA
    assert found == (3 * 1 + 4 * 10 + 3 * 50, 50, True)


def test_loops_that_do_not_pair_are_counted_in_ptx() -> None:
    executed = Counter({0: 1, 1: 10, 2: 50, 3: 50, 4: 50, 5: 10, 6: 10, 7: 1})
    unrolled = SASS.replace("BRA 0x20", "BRA 0x50")
    assert machine_code.issued(PTX, JUMPS, executed, unrolled) == (182, 50, False)


def test_an_unrolled_loop_is_known_by_its_work() -> None:
    zero, body = (0, 2, 0), (2, 2, 16)
    assert machine_code.pair([zero, body], [(0, 8, 0), zero, body]) == [(1, 4), (1, 1), (2, 1)]
    assert machine_code.pair([body, body], [body, body]) == [(1, 1), (2, 1)]
    assert machine_code.pair([body, body], [(4, 4, 32), body, body]) == [(1, 2), (1, 1), (2, 1)]
    assert machine_code.pair([body], [(2, 2, 15), body]) is None
    assert machine_code.pair([zero, body], [body]) is None
    unrolled = SASS.replace("0x10 ;\n", "0x10 ;\n        /*0078*/  STG.E [R4], R3 ;\n        /*007c*/  BRA 0x78 ;\n", 1)
    assert not machine_code.issued(PTX, JUMPS, Counter(), unrolled).paired


def test_two_ways_back_to_a_header_are_one_loop() -> None:
    assert machine_code.loops([(9, 2), (5, 2), (7, 4), (3, 8)]) == [(2, 9), (4, 7)]
    assert machine_code.own(machine_code.loops([(9, 2), (7, 4)]), 11) == [[0, 1, 10], [2, 3, 8, 9], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "programs"),
    [
        (4, 32, 0, 16),
        (1, 32, 0, 32),
        (8, 255, 0, 1),
        (4, 128, 0, 4),
        (8, 64, 57344, 4),
        (4, 40, 232448, 1),
        (1, 89, 0, 20),
    ],
)
def test_occupancy(warps: int, registers: int, shared: int, programs: int) -> None:
    assert roofline.resident(warps, registers, shared) == programs


def row(**changed: Any) -> dict[str, Any]:
    base = {"problem": "p", "size": "s", "arch": 90, "kernel": "k", "programs": 1320, "warps": 4, "registers": 32}
    base |= {"stack": 0, "shared": 0, "bytes": 3.015e9, "instructions": 132e6 * 4, "special": 0.0, "paired": True}
    return base | changed


def test_bounds() -> None:
    found = roofline.bounds(row())
    assert found["issue"] == pytest.approx(1e6 / roofline.CLOCK)
    assert found["H100"] == pytest.approx(1e-3)
    assert roofline.limit(found, "H100") == "bytes"
    # a multiprocessor's 16 lanes take two cycles a warp instruction, its four schedulers together a quarter each
    assert roofline.bounds(row(special=132e6))["special"] == pytest.approx(2e6 / roofline.CLOCK)
    # one program of one warp: an instruction a cycle, whatever else is idle
    assert roofline.bounds(row(programs=1, warps=1, instructions=1000))["issue"] == pytest.approx(1000 / roofline.CLOCK)
    # 133 programs: one multiprocessor has two of them
    busy = roofline.bounds(row(programs=133, warps=4, instructions=133 * 4000))
    assert busy["issue"] == pytest.approx(2000 / roofline.CLOCK)
    assert roofline.limit(roofline.bounds(row(bytes=10.0, instructions=10.0)), "H200") == "launch"


def test_the_document_shows_the_results() -> None:
    payload = json.loads(roofline.RESULTS.read_text())
    document = roofline.DOCUMENT.read_text()
    assert roofline.embed(document, payload) == document
    assert {row["arch"] for row in payload["kernels"]} <= {80, 90}
    for result in payload["kernels"]:
        assert result["instructions"] >= result["programs"] * result["warps"]
    with pytest.raises(ValueError, match="roofline"):
        roofline.embed("no marks", payload)


def test_table_marks_what_is_not_sm_90_or_not_sass() -> None:
    text = roofline.table({"kernels": [row(arch=80, paired=False), row(stack=8)]})
    assert "| 32 |" in text
    assert "| 32 + 8 B |" in text
    assert "`k` (sm_80 code)" in text
    assert "PTX 528 M" in text


@pytest.mark.skipif(not HAS_TRITON or interpreting(), reason="needs Triton's compiler")
def test_work_that_is_linear_is_extended_right() -> None:
    problem = next(problem for problem in roofline.problems() if problem.name == "add_rms_norm")
    extended = roofline.works(problem._replace(batch=24, probes=(2, 5)))
    whole = roofline.works(problem._replace(batch=24, probes=None))
    assert extended == whole
    work = whole[0]
    assert work.bytes == 24 * 2048 * 2 * 4 + 2048 * 2  # residual and x in, residual and result out, one weight
    assert work.programs == 24
