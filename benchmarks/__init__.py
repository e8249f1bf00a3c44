"""Benchmarks: every public kernel against its peers and the physical floor. See README.md in this folder."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts bytes, otherwise writes to stderr
