"""Metrics, images, videos and progress of a run, and the loggers that receive them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports

if TYPE_CHECKING:
    from w2f_torchrl.logging.metrics import MetricsLogger
    from w2f_torchrl.logging.metrics_file import read_metrics
    from w2f_torchrl.logging.progress import ProgressBar
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "metrics": ("MetricsLogger",),
            "metrics_file": ("read_metrics",),
            "progress": ("ProgressBar",),
        },
    )

__all__ = ["MetricsLogger", "ProgressBar", "read_metrics"]
