"""How the small models are taught (``fastrl tiny build``, ``fastrl tiny teach``)."""
