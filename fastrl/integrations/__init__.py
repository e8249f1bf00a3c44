"""Other trainers with fastrl's forward: prompts and their pictures computed once for all their answers."""
