"""The papers' claims, each an experiment."""
