"""NaN must be kept on a GPU, where the minimum and maximum of two numbers are the one that is not NaN; in the
interpreter they are NaN. Here the interpreter gets the GPU's functions, and the documented results for NaN must not
change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastrl_kernels import policy_loss, unlikelihood_loss

pytestmark = pytest.mark.interpreter
NAN = float("nan")


@pytest.fixture(autouse=True)
def gpu_minimum_and_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        monkeypatch.setattr(
            interpreter.InterpreterBuilder, name, lambda self, a, b, f=function: self.binary_op(a, b, f), raising=True
        )


@pytest.mark.parametrize("options", [{"old_logp": torch.tensor([-1.0, -1.5, -2.0])}, {"beta": 0.1}])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_policy_loss(options: dict, kl: str) -> None:
    logp = torch.tensor([-1.0, NAN, -2.0], requires_grad=True)
    reference = torch.tensor([-1.0, -1.0, -2.0])
    out = policy_loss(logp, torch.tensor([1.0, -1.0]), torch.tensor([0, 0, 1]), ref_logp=reference, kl=kl, **options)
    assert out.loss.isnan()
    out.loss.backward()
    assert logp.grad is not None
    assert logp.grad[[0, 2]].isfinite().all()  # of the rows that are numbers


def test_unlikelihood_loss() -> None:
    assert unlikelihood_loss(torch.tensor([-1.0, NAN]), torch.tensor([0.5, 0.0])).isnan()


def test_rows_of_weight_zero_may_hold_nan() -> None:
    weight = torch.tensor([0.5, 0.0, 0.5])
    logp, old = torch.tensor([-1.0, NAN, -2.0]), torch.tensor([-1.2, -1.5, -2.0])
    loss = policy_loss(logp, torch.tensor([1.0, -1.0]), torch.tensor([0, 0, 1]), old_logp=old, weight=weight).loss
    assert loss.isfinite()
    assert unlikelihood_loss(logp, torch.tensor([0.5, 0.0, 1.0]), weight=weight).isfinite()
