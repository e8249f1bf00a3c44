"""fastrl's forward in other trainers: prompts and their pictures are computed once for all their answers."""
