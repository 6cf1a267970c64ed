"""Policies and student segmenters as files that run without this package: ONNX, or torch.export.

``python -m w2f_torchrl.export CHECKPOINT policy.onnx``; ``.onnx`` needs
``pip install "w2f_torchrl[export]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports

if TYPE_CHECKING:
    from w2f_torchrl.export.formats import ExportError, read_description
    from w2f_torchrl.export.write import export_file, export_policy, export_segmenter
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "formats": ("ExportError", "read_description"),
            "write": ("export_file", "export_policy", "export_segmenter"),
        },
    )

__all__ = ["ExportError", "export_file", "export_policy", "export_segmenter", "read_description"]
