"""Whole training steps side by side with another trainer. ``benchmarks/vs_trl.py`` is the command."""
