"""Files and control of a run: its folder, checkpoints, metrics, progress, traces, and signals that stop it."""
