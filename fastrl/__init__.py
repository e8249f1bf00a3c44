"""fastrl: RL post-training for perception MLLMs. See README.md; the modules import lazily, this one imports nothing."""

__version__ = "0.1.0"
