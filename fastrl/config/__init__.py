"""What a recipe may hold (``sections``), how its text is read (``reader``), what is said about faults in it
(``problems``), and the registries of names that recipes use. Imports no torch; the whole recipe, which knows the
methods, is ``fastrl.recipe``."""
