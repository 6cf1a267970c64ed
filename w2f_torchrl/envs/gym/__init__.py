"""Gymnasium's environments from pixels: ``environment=gym environment.task=ID``."""
