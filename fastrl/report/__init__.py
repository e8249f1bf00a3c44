"""Pictures and pages drawn from a run's files."""
