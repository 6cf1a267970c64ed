"""One self-contained HTML page of a run or several: ``python -m w2f_torchrl.report RUN...``."""

from w2f_torchrl.report.page import write_report

__all__ = ["write_report"]
