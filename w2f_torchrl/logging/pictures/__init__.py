"""Pictures, films, videos and curves."""
