"""A recipe's sections (``sections``), its YAML reader (``reader``), messages about mistakes in it (``problems``), and
the registries of names that recipes use. Imports no torch. The whole recipe, including methods, is ``fastrl.recipe``.
"""
