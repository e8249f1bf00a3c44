"""How the small models are taught (``fastrl tiny build``)."""
