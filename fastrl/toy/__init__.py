"""The small models that ship with fastrl: how they are taught, and the demos on them."""
