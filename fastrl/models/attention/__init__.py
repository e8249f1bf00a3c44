"""Attention over packed rows: prefix-shared and variable-length paths, and attention maps of answers."""
