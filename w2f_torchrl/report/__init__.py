"""A self-contained HTML page about one or several runs: ``python -m w2f_torchrl.report RUN...``."""

from w2f_torchrl.report.page import write_report

__all__ = ["write_report"]
