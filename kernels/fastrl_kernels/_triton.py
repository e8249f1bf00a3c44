"""One import of Triton for the whole library.

Kernel files write ``from fastrl_kernels._triton import HAS_TRITON, tl, triton``. If Triton is not installed, a stub
lets the modules import: decorated kernels become objects that raise when launched, and every public function takes its
CPU path.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # a platform without Triton wheels, or a CPU-only install
    HAS_TRITON = False

    class _Missing:
        """Stub for ``triton`` and ``triton.language``: has any attribute, and raises on launch."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and callable(args[0]) and not kwargs and not isinstance(args[0], _Missing):
                return self  # used as a bare decorator
            return self

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("this kernel needs Triton (pip install triton); CPU tensors take the eager path")

        def cdiv(self, a: int, b: int) -> int:
            return -(-a // b)

        def next_power_of_2(self, n: int) -> int:
            return 1 if n <= 1 else 1 << (n - 1).bit_length()

    triton = tl = _Missing()  # type: ignore[assignment]

__all__ = ["HAS_TRITON", "tl", "triton"]
