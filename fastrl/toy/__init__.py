"""The small models that ship with fastrl: their training, and the demos that use them."""
