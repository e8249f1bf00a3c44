"""Engines: what turns a loss into an update, on one process or several."""
