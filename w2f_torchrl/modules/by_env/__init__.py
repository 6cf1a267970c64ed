"""Parts that only some environments need: discrete actions, observations besides ``pixels``."""
