"""Public calls compiled as for a launch on a GPU: no shipped configuration spills, and the gate detects spills."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch

import fastrl_kernels
from fastrl_kernels import (
    aot,
    detection_reward,
    linear_assignment,
    pairwise_iou,
    policy_loss,
    token_logprob,
)
from fastrl_kernels._aot_calls import CALLS
from fastrl_kernels._common import interpreting, launch, use_triton
from fastrl_kernels._triton import HAS_TRITON, tl, triton

pytestmark = pytest.mark.skipif(not HAS_TRITON or interpreting(), reason="needs Triton's compiler")


@triton.jit
def _copy_kernel(source, target, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + offsets, mask=offsets < size, other=0.0)
    tl.store(target + offsets, value, mask=offsets < size)


@triton.jit
def _hoarding_kernel(source, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(source + offsets)
    tl.store(target + offsets, value / tl.sum(value, 0))  # the whole block must stay in registers


@pytest.mark.gate
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("name", CALLS)
def test_no_shipped_launch_spills(name: str, arch: int) -> None:
    launches = aot.shipped(arch, [name])
    assert launches
    assert [problem for one in launches for problem in aot.problems(one)] == []


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_launches_that_once_spilled(arch: int) -> None:
    boxes = torch.zeros(1, 16, 4, requires_grad=True)
    with aot.as_launched(arch) as launches:
        linear_assignment(torch.zeros(2, 512, 48))
        linear_assignment(torch.zeros(2, 4096, 16))
        pairwise_iou(boxes, boxes.detach(), kind="ciou", reduce="max").sum().backward()
        token_logprob(torch.zeros(3, 2000, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64))
    assert [one.stack for one in launches] == [0, 0, 0, 0, 0]
    assert launches[1].shared <= 256


STRIDE = re.compile(r"stride|^(q|prefix|own|cache)_(row|head|group|key|slot)$|^grad_(batch|i|j)$")
WITHIN_A_PROBLEM = {
    "_assignment_kernel": {"stride_n", "stride_m"},  # which copies a cost whose offsets need 33 bits
    "linear_logprob_fold_kernel": {"state_stride"},  # rows of a slab, times three at most
}


def narrow_strides(ttir: str, kernel: str) -> set[str]:
    """Strides that the kernel multiplies in 32 bits, from its Triton IR."""
    narrow: dict[str, str] = {}  # value -> the argument that it comes from, still 32 bits
    found = set()
    for name in re.findall(r"(%\w+): i32", ttir.partition("attributes")[0]):
        if STRIDE.search(name[1:]):
            narrow[name] = name[1:]
    for result, operation, operands in re.findall(r"(%\w+) = (tt\.splat|arith\.muli) (.+?) :", ttir):
        values = [value.strip() for value in operands.split(",")]
        met = [narrow[value] for value in values if value in narrow]
        if operation == "tt.splat" and met:
            narrow[result] = met[0]
        elif met:
            found.add(met[0])
    return found - WITHIN_A_PROBLEM.get(kernel, set())


@triton.jit
def _narrow_kernel(source, target, stride, wide_stride, BLOCK: tl.constexpr):
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(target + row.to(tl.int64) * wide_stride + lane, tl.load(source + row * stride + lane))


def test_a_stride_multiplied_in_32_bits_is_seen() -> None:
    x = torch.zeros(4096)
    compiled = _launch(_narrow_kernel, x, x, 1024, 1024, BLOCK=1024).compiled
    assert narrow_strides(compiled.asm["ttir"], "_narrow_kernel") == {"stride"}


@pytest.mark.gate
@pytest.mark.parametrize("name", CALLS)
def test_strides_are_multiplied_in_64_bits(name: str) -> None:
    for one in aot.shipped(90, [name]):
        assert narrow_strides(one.compiled.asm["ttir"], one.name) == set()


@pytest.mark.gate
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 128), (torch.bfloat16, 64)])
def test_a_box_is_one_access(dtype: torch.dtype, bits: int) -> None:
    """Beside boxes only counts (64 bits), upstream gradients and columns of maxima (32) are loaded."""
    boxes, count = torch.zeros(2, 300, 4, dtype=dtype), torch.full((2,), 300)
    with aot.as_launched(90) as launches:
        pairwise_iou(boxes, boxes)
        pairwise_iou(boxes, boxes, reduce="max")
        detection_reward(boxes, boxes, count, count)
        table = len(launches)
        pairwise_iou(boxes.requires_grad_(), boxes.detach()).sum().backward()
    for at, one in enumerate(launches):
        words = _words(aot.instructions(one.compiled), "LDG")
        assert words[bits] >= 2
        assert set(words) - {64, bits} <= (set() if at < table else {32})
        assert at == 2 or one.barriers == 0


def test_every_public_function_with_a_kernel_is_gated() -> None:
    functions = {name for name in fastrl_kernels.__all__ if name.islower()}
    assert set(CALLS) == functions - {"token_weights"}  # which is plain torch


def test_a_launch_is_specialised_on_its_arguments_and_named_by_its_call() -> None:
    logp = torch.zeros(1, requires_grad=True)
    with aot.as_launched(90) as launches:
        policy_loss(logp, torch.zeros(1), torch.zeros(1, dtype=torch.int64), beta=0.5, ref_logp=logp.detach())
        pairwise_iou(torch.zeros(1, 32, 4), torch.zeros(1, 20, 4), kind="giou")
        pairwise_iou(torch.zeros(1, 32, 4), torch.zeros(1, 20, 4), kind="giou")
        token_logprob(torch.zeros(3, 32), torch.zeros(3, dtype=torch.int64))
    names = ["policy_rows_kernel", "policy_totals_kernel", "_iou_kernel", "linear_logprob_fold_kernel"]
    assert [one.name for one in launches] == names
    assert (
        launches[0].call == "policy_loss(logp=f32[1], advantage=f32[1], completion=i64[1], ref_logp=f32[1], beta=0.5)"
    )
    assert launches[2].call == "pairwise_iou(a=f32[1,32,4], b=f32[1,20,4], kind='giou')"
    assert launches[0].compiled.src.constants  # n = 1 among them
    names = launches[3].compiled.src.fn.arg_names
    divisible = {names[path[0]] for path, attributes in launches[3].compiled.src.attrs.items() if attributes}
    assert {"tile", "target", "logp", "tile_stride", "width"} <= divisible
    assert "state_stride" not in divisible  # 3


def test_a_backward_is_named_after_its_forward() -> None:
    a = torch.zeros(1, 20, 4, requires_grad=True)
    with aot.as_launched(80) as launches:
        pairwise_iou(a, a.detach()).sum().backward()
    call = "pairwise_iou(a=f32[1,20,4], b=f32[1,20,4])"
    assert [one.call for one in launches] == [call, f"{call}, backward"]


def _loops(compiled) -> list[list[str]]:
    """The bodies of a kernel's loops, innermost ones first: instructions up to a branch back."""
    lines = []
    for line in aot._cuobjdump(compiled.asm["cubin"], "-sass").splitlines():
        match = re.match(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", line)
        if match:
            lines.append((int(match[1], 16), match[2]))
    bodies = []
    for address, code in lines:
        back = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", code)
        if back and int(back[1], 16) < address:
            bodies.append([text for at, text in lines if int(back[1], 16) <= at <= address])
    return sorted(bodies, key=len)


def _words(body: list[str], kind: str) -> Counter:
    """Memory instructions of a kind by the bits that each moves."""
    found = [re.search(rf"\b{kind}\.E((?:\.\w+)*)", code) for code in body]
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    return Counter(next((widths[p] for p in m[1].split(".") if p in widths), 32) for m in found if m)


def _head_launches(vocabulary: int) -> dict[str, aot.Launch]:
    with aot.as_launched(90) as launches:
        logits = torch.zeros(3, vocabulary, dtype=torch.bfloat16, requires_grad=True)
        out = token_logprob(logits, torch.zeros(3, dtype=torch.int64), return_entropy=True)
        (out.logp.sum() + out.entropy.sum()).backward()
    return {one.name: one for one in launches}


ELEMENTS = 4096 // (8 * 32)  # of a thread in one iteration


@pytest.mark.gate
@pytest.mark.parametrize("vocabulary", [151936, 50257])
def test_fold_takes_at_most_12_instructions_an_element_with_loads_in_flight(vocabulary: int) -> None:
    loops = _loops(_head_launches(vocabulary)["linear_logprob_fold_kernel"].compiled)
    (body,) = [body for body in loops if _words(body, "LDG") == {128: 2} and "MUFU.EX2" in " ".join(body)][:1]
    assert len(body) <= 12 * ELEMENTS
    loads = [i for i, code in enumerate(body) if "LDG" in code]
    for i in loads:  # its words are needed one block of arithmetic later, if not in the next iteration
        register = int(re.search(r"LDG\S+ R(\d+)", body[i])[1])
        wanted = re.compile("|".join(rf"\bR{register + k}\b" for k in range(4)))
        used = [j for j in range(i + 1, len(body)) if wanted.search(body[j].partition(",")[2])]
        assert not used or used[0] - i > 4 * ELEMENTS


@pytest.mark.gate
@pytest.mark.parametrize("vocabulary", [151936, 50257])
def test_gradients_and_zeros_move_in_128_bit_words(vocabulary: int) -> None:
    compiled = _head_launches(vocabulary)["linear_logprob_gradient_kernel"].compiled
    stores = [_words(body, "STG") for body in _loops(compiled)]
    assert len(stores) >= 2  # of zeros, and of gradients
    assert all(set(words) == {128} for words in stores)
    loads = [_words(body, "LDG") for body in _loops(compiled)]
    assert sum(words[128] for words in loads) >= 2
    assert all(set(words) <= {128} for words in loads)


def _launch(kernel, *arguments, **options) -> aot.Launch:
    with aot.as_launched(90) as launches:
        launch(kernel, 1)(*arguments, **options)
    return launches[0]


def test_gate_sees_a_spill_and_a_barrier_in_one_warp() -> None:
    x = torch.zeros(65536)
    assert "bytes of stack" in aot.problems(_launch(_hoarding_kernel, x, x, BLOCK=65536, num_warps=4))[0]
    good = _launch(_hoarding_kernel, x, x, BLOCK=1024, num_warps=4)
    assert good.barriers > 0
    assert aot.problems(good) == []
    assert "in a program of one warp" in aot.problems(good._replace(warps=1))[0]


def test_divisible_sizes_give_wider_access() -> None:
    x = torch.zeros(4096)
    few, many = (_launch(_copy_kernel, x, x, size, BLOCK=1024) for size in (1024, 1023))
    assert any(".128" in code for code in aot.instructions(few.compiled))
    assert len(aot.instructions(few.compiled)) < len(aot.instructions(many.compiled))
    assert 8 <= few.registers <= 64
    assert (few.stack, few.shared, few.barriers, few.warps, few.programs) == (0, 0, 0, 4, 1)


def test_the_stand_in_leaves_with_the_context() -> None:
    from triton.runtime.driver import driver

    before = driver._active
    with pytest.raises(ValueError, match="cost: expected shape"), aot.as_launched(90):  # noqa: PT012
        assert use_triton(torch.zeros(1))
        linear_assignment(torch.zeros(1))
    assert driver._active is before
    assert not use_triton(torch.zeros(1))
    cost = torch.rand(1, 4, 4)
    assert linear_assignment(cost).match.sort().values.tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="arch: expected one of 80, 90, 100, got 75"), aot.as_launched(75):
        pass


def test_table_and_json(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.zeros(65536)
    calls = {
        "good": lambda: launch(_copy_kernel, 1)(x, x, 1024, BLOCK=1024),
        "bad": lambda: launch(_hoarding_kernel, 1)(x, x, BLOCK=65536),
    }
    monkeypatch.setattr("fastrl_kernels._aot_calls.CALLS", calls)
    assert aot.main(["--only", "good", "--json", str(tmp_path / "out" / "aot.json")]) == 0
    written = json.loads((tmp_path / "out" / "aot.json").read_text())
    assert [row["arch"] for row in written["kernels"]] == list(aot.ARCHITECTURES)
    assert {"name", "registers", "stack", "shared", "barriers", "call", "instructions"} <= set(written["kernels"][0])
    assert aot.main(["--only", "bad"]) == 1
    assert "_hoarding_kernel on sm_80" in capsys.readouterr().err
