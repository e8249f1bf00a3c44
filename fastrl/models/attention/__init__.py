"""Attention over packed rows: prefix-shared paths, variable-length calls, where answers look."""
