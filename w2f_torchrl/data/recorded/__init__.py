"""Recorded episodes: read from files, checked, and fed to the replay in place of an environment."""
