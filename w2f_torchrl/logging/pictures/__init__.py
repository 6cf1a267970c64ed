"""Images, videos and curves."""
