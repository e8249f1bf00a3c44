"""Every kernel as compiled, run by the interpreter in ``tests/ptx`` without a GPU, against its float64 twin.

Triton compiles each launch as on the named GPU; the PTX runs with its real arguments, with bounds, alignment, barriers
and uninitialised reads checked. Kernels with a matrix product run from their sm_80 code: the instructions that later
GPUs have for it (``wgmma``, ``tcgen05``) are not interpreted.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

import pytest
import torch

import fastrl_kernels
from fastrl_kernels._common import interpreting
from fastrl_kernels._triton import HAS_TRITON
from tests.helpers.ptx_cases import Case, cases, outcomes

pytestmark = pytest.mark.skipif(not HAS_TRITON or interpreting(), reason="needs Triton's compiler")

CASES = list(cases()) if HAS_TRITON else []
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest number, and relative


def check(case: Case, arch: int) -> None:
    from tests.ptx.launch import run_ptx

    want, ours = outcomes(case)
    with run_ptx(arch) as launches:
        got = ours()
    assert {launch.name for launch in launches} == case.kernels
    for mine, truth in zip(got, want, strict=True):
        mine, truth = mine.detach().double(), truth.detach().double()
        finite = truth[truth.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        tolerance = TOLERANCE[case.dtype]
        torch.testing.assert_close(mine, truth, rtol=tolerance, atol=tolerance * scale)


def architecture(case: Case) -> int:
    return 80 if case.dot else 90


@pytest.mark.parametrize("case", [case for case in CASES if case.fast], ids=lambda case: case.name)
def test_compiled_kernel_equals_its_twin(case: Case) -> None:
    check(case, architecture(case))


@pytest.mark.gate
@pytest.mark.parametrize("case", [case for case in CASES if not case.fast], ids=lambda case: case.name)
def test_more_compiled_kernels_equal_their_twins(case: Case) -> None:
    check(case, architecture(case))


@pytest.mark.gate
@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("case", [case for case in CASES if case.fast and not case.dot], ids=lambda case: case.name)
def test_other_architectures_equal_the_twins(case: Case, arch: int) -> None:
    check(case, arch)


@pytest.mark.gate
@pytest.mark.parametrize("entropy", [False, True])
def test_nine_tenths_of_rows_of_odd_stride_move_in_128_bit_words(entropy: bool) -> None:
    """[N, 50257]: of the bytes that threads ask for, counted as executed."""
    from tests.ptx.launch import run_ptx

    logits = torch.randn(2, 50257, dtype=torch.bfloat16, requires_grad=True)
    with run_ptx(90) as launches:
        out = fastrl_kernels.token_logprob(logits, torch.tensor([5, 50256]), return_entropy=entropy)
        (out.logp[0] + (out.entropy[0] if entropy else 0)).backward()  # the second row's gradient is zeros
    assert len(launches) == 2
    for launch in launches:
        issued, asked = launch.counts.opcodes.items(), launch.counts.read.bytes + launch.counts.written.bytes
        words = sum(times for opcode, times in issued if re.match(r"(ld|st)\.global.*\.v4\.b32", opcode))
        assert 0.9 * asked <= words * 32 * 16 <= asked, launch.name  # no word is masked


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_barrier_taken_out_of_a_kernel_of_the_package_is_caught(left_out: int, monkeypatch: Any) -> None:
    """The gradient of several targets: the raw logits are read before, and the targets written after, all others."""
    from tests.ptx import launch
    from tests.ptx.faults import Race

    hidden, weight = torch.randn(2, 4, requires_grad=True), torch.randn(1100, 4, requires_grad=True)
    target, whole = torch.tensor([[3, 700, 1099], [900, 3, 3]]), launch.execute

    def without(compiled: Any, arguments: dict[str, Any], grid: tuple[int, ...]) -> Any:
        text = compiled.asm["ptx"]
        places = [found.start() for found in re.finditer(r"bar\.sync[^;]*;", text)]
        if compiled.metadata.name != "linear_logprob_gradient_kernel":
            return whole(compiled, arguments, grid)
        at = places[(-2, -1)[left_out]]
        compiled.asm["ptx"] = text[:at] + text[at:].partition(";")[2]
        try:
            return whole(compiled, arguments, grid)
        finally:
            compiled.asm["ptx"] = text

    with launch.run_ptx(90):
        out = fastrl_kernels.linear_logprob(hidden, weight, target, softcap=3.0).logp.sum()
        monkeypatch.setattr(launch, "execute", without)
        with pytest.raises(Race, match="without a barrier between"):
            out.backward()


def test_every_kernel_of_the_package_is_run() -> None:
    from triton.runtime.jit import JITFunction

    found = set()
    for module in pkgutil.iter_modules(fastrl_kernels.__path__, prefix="fastrl_kernels."):
        if module.name.endswith("_C"):
            continue  # the C++ library
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found.add(name)
    assert found == set().union(*(case.kernels for case in CASES))
    assert found == set().union(*(case.kernels for case in CASES if case.fast)), "one of each kernel is in make test"
