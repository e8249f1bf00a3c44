"""Builds the optional native extension; everything else about the package is in pyproject.toml.

``fastrl_kernels._C`` has the CPU paths for which Python is too slow (assignment, detection reward, decode step), or
which are many small operators in torch (losses, advantages, overlaps, what lies between a layer's products). It needs
a C++17 compiler but no torch headers. Without a compiler the build prints a notice and continues: the eager path
computes the same.
"""

from __future__ import annotations

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NOTICE = """
***********************************************************************************************
fastrl: the native extension was NOT built: {reason}
Everything still works; assignment, rewards, losses, overlaps and decoding take the slower eager path on CPU.
To build it, install a C++17 compiler (g++ or clang++) and run `pip install .` again.
***********************************************************************************************
"""


class OptionalBuild(build_ext):
    """Builds what can be built and prints a notice for what cannot."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            print(NOTICE.format(reason=error), flush=True)
            raise  # ``optional=True`` turns this into a warning


SOURCES = (
    "module", "assignment", "detection_reward", "kernels", "decode_step", "weights", "advantage", "policy", "listwise",
    "overlap", "logits", "pointwise", "pointwise_bodies",
)  # fmt: skip
HEADERS = ("common", "assignment", "exact", "wide", "kernels", "sampler", "team", "decode_step", "pointwise")

native = Extension(
    "fastrl_kernels._C",
    sources=[f"csrc/{name}.cpp" for name in SOURCES],
    depends=[f"csrc/{name}.hpp" for name in HEADERS],
    language="c++",
    # -ffp-contract=off: no fused multiply-add, so every machine rounds alike (but for products: wide.hpp).
    # -Wno-psabi: vector types stay inlined.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-pthread",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-Wno-psabi",
    ],
    extra_link_args=["-pthread"],
    py_limited_api=True,
    optional=True,
)

setup(
    ext_modules=[native],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
