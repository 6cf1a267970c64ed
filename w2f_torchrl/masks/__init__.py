"""Sources of a run's masks, and their storage."""
