"""Where a run's masks come from, and how they are stored."""
