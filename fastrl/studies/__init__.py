"""Experiments that test the papers' claims."""
