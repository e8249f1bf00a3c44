"""Benchmarks: every public kernel against its peers and the physical floor. See README.md beside this file."""
