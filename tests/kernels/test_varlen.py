"""The choice between attention paths, and the libraries' calls in one set of words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl_kernels import varlen
from tests.helpers.attention import eager_varlen

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_dense_path_is_taken_where_no_kernel_can_go_and_says_why(monkeypatch) -> None:
    monkeypatch.setattr(varlen, "_capability", lambda _: (9, 0))
    found = varlen.find(hopper=True)
    assert varlen.choose(CPU, torch.bfloat16, 128) == (None, f"no GPU: {varlen.DENSE}")
    assert "not torch.float32" in varlen.choose(GPU, torch.float32, 128).reason
    assert "head size 20" in varlen.choose(GPU, torch.bfloat16, 20).reason
    assert "head size 512" in varlen.choose(GPU, torch.bfloat16, 512).reason
    assert varlen.choose(GPU, torch.float16, 80).call is found.call
    monkeypatch.setattr(varlen, "_capability", lambda _: (7, 5))
    assert "older than compute capability 8.0" in varlen.choose(GPU, torch.bfloat16, 128).reason
    monkeypatch.setattr(varlen, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(varlen, "find", lambda **_: varlen.Found(None, "none", ("a: ImportError", "b: too old")))
    assert varlen.choose(GPU, torch.bfloat16, 128) == (None, f"a: ImportError; b: too old: {varlen.DENSE}")


def import_only(monkeypatch, modules: dict[str, Any]) -> None:
    def import_module(name: str) -> Any:
        if name not in modules:
            raise ModuleNotFoundError(name)
        return modules[name]

    monkeypatch.setattr(varlen.importlib, "import_module", import_module)


def test_libraries_are_found_in_order_by_what_they_offer(monkeypatch) -> None:
    find = varlen.find.__wrapped__
    old = SimpleNamespace(varlen_attn=lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None)
    flash = SimpleNamespace(flash_attn_varlen_func=lambda q, k, v, cu_seqlens_q, cu_seqlens_k: None)
    import_only(monkeypatch, {})
    assert find().call is None
    assert [line.split(":")[1] for line in find().missing] == [" ModuleNotFoundError"] * 4
    assert find(hopper=True).missing[:2] == (
        "flash-attn 3: ModuleNotFoundError",
        "torch.nn.attention.varlen: ModuleNotFoundError",
    )
    import_only(monkeypatch, {"torch.nn.attention.varlen": old, "flash_attn": flash})
    found = find()
    assert (found.name, found.missing[0]) == ("flash-attn 2", "torch.nn.attention.varlen: too old")
    import_only(monkeypatch, {"flash_attn.cute": flash, "flash_attn_interface": flash})
    assert find().name == "flash-attn 3"
    own = SimpleNamespace(varlen_attn=lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None: None)
    for module in ("flash_attn_interface", "flash_attn_3.flash_attn_interface"):
        import_only(monkeypatch, {"torch.nn.attention.varlen": own, module: flash})
        assert (find().name, find(hopper=True).name) == ("torch.nn.attention.varlen", "flash-attn 3")
    import_only(monkeypatch, {"torch.nn.attention.varlen": own})
    assert find(hopper=True).name == "torch.nn.attention.varlen"
    import_only(monkeypatch, {"flash_attn": SimpleNamespace(), "flash_attn.cute": flash})
    assert find().name == "flash-attn 4"


def arguments() -> tuple[Any, ...]:
    q, k = torch.randn(5, 4, 8), torch.randn(7, 2, 8)
    cu_q, cu_k = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)
    return q, k, k + 1, cu_q, cu_k, 3, 4


@pytest.mark.parametrize("causal", [True, False])
def test_torch_is_called_in_the_words_of_each_of_its_versions(causal: bool) -> None:
    """A window and grouped heads if it supports them; ``is_causal`` and repeated heads if not."""
    seen: dict[str, Any] = {}

    def later(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        seen.update(window=window_size, gqa=enable_gqa, heads=key.shape[1])
        return eager_varlen(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, causal=window_size == (-1, 0)
        )

    def earlier(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, *, scale=None):
        seen.update(causal=is_causal, heads=key.shape[1])
        return eager_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, causal=is_causal)

    given = arguments()
    want = eager_varlen(*given, scale=0.4, causal=causal)
    for function, expected in (
        (later, {"window": (-1, 0 if causal else -1), "gqa": True, "heads": 2}),
        (earlier, {"causal": causal, "heads": 4}),
    ):
        seen.clear()
        call = varlen._torch_call(SimpleNamespace(varlen_attn=function))
        assert call is not None
        torch.testing.assert_close(call(*given, scale=0.4, causal=causal), want)
        assert seen == expected


def test_flash_attn_is_called_by_the_names_each_generation_knows() -> None:
    def second(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
               causal=False, window_size=(-1, -1), deterministic=False):  # fmt: skip
        return eager_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                            scale=softmax_scale, causal=causal)  # fmt: skip

    def fourth(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, softmax_scale=None, causal=False):
        assert seqused_q is None
        return eager_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, 3, 4, scale=softmax_scale, causal=causal), None

    given = arguments()
    for function in (second, fourth):
        call = varlen._flash_call(SimpleNamespace(flash_attn_varlen_func=function))
        assert call is not None
        for causal in (True, False):
            want = eager_varlen(*given, scale=0.4, causal=causal)
            torch.testing.assert_close(call(*given, scale=0.4, causal=causal), want)


def test_the_installed_torch_takes_the_call_and_its_backward() -> None:
    """On tensors without storage: the shapes that the operator accepts and returns."""
    found = varlen.find()
    if found.name != "torch.nn.attention.varlen":
        pytest.skip(f"found {found.name}")
    assert found.call is not None
    meta = torch.device("meta")
    q = torch.empty(20, 4, 16, device=meta, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.empty(30, 2, 16, device=meta, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    cu = torch.zeros(4, device=meta, dtype=torch.int32)
    out = found.call(q, k, v, cu, cu, 9, 12, scale=0.25, causal=True)
    assert out.shape == q.shape
    out.sum().backward()
    assert [x.grad.shape for x in (q, k, v) if x.grad is not None] == [q.shape, k.shape, v.shape]
