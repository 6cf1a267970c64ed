"""Seeds, logging, video and pictures."""
