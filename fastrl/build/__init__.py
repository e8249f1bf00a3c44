"""``fastrl build``: training data from a model's own answers."""
