"""The programs and their settings: ``python -m sota_configs.world2filter``, or ``w2f-train``."""
