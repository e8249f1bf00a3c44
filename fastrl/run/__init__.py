"""What a run keeps: its folder, checkpoints, metrics, progress, traces and the signals that stop it."""
