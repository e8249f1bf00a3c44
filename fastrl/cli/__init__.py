"""The ``fastrl`` command."""
