"""Sources of a run's masks: they take records and return them with masks, and measure the cost."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from w2f_torchrl.config import ConfigError
from w2f_torchrl.keys import NEXT_MASK
from w2f_torchrl.segmenters import (
    MedianSegmenter,
    Segmenter,
    StudentSegmenter,
    mask_iou,
    train_student,
)
from w2f_torchrl.transforms import ForegroundMaskTransform

logger = logging.getLogger(__name__)

PIXELS = ("next", "pixels")
REFIT_FRAMES = 200


class MaskSource:
    """The simulator's masks, as the env rendered them; also the base class of other sources.

    Metrics are means since they were last read: ``segmentation/iou`` with the simulator's mask, if
    the env renders one; ``segmentation/milliseconds`` per frame; ``segmentation/frames``, the
    number segmented so far; and ``segmentation/source_<name>``, which is 1.

    Args:
        name: Name of the source, as in ``segmentation.source``.
        mask_dropout: Share of frames, in [0, 1), whose mask is emptied, as by a segmenter that
            loses the agent now and then.
        seed: Seed that decides which frames these are.
    """

    def __init__(self, name: str, *, mask_dropout: float = 0.0, seed: int = 0) -> None:
        self.name = name
        self.mask_dropout = mask_dropout
        self.seed = seed
        self.frames = 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def label(self, records: TensorDictBase) -> TensorDictBase:
        """Return records ``[M]`` with their masks, bool ``[M, 1, H, W]`` under ``next``."""
        if self.mask_dropout:
            records = self._drop_masks(records)
        self.frames += len(records)
        return records

    def segment(self, records: TensorDictBase) -> TensorDictBase:
        """Return records that are not for training with their masks; nothing is counted."""
        return records

    def metrics(self) -> dict[str, float]:
        """Return the metrics since the last call."""
        means = {
            f"segmentation/{name}": total / self._counts[name] for name, total in self._sums.items()
        }
        self._sums, self._counts = {}, {}
        return means | {
            "segmentation/frames": float(self.frames),
            f"segmentation/source_{self.name}": 1.0,
        }

    def learned(self) -> Iterable[Tensor]:
        """Return what it has learned, which must be equal on all ranks."""
        return ()

    def save_student(self, path: Path) -> None:
        """Write the student for other runs, if the source has one."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain Python types and tensors."""
        sums = {"sums": dict(self._sums), "counts": dict(self._counts)}
        return {"name": self.name, "frames": self.frames, **sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state.

        Raises:
            ConfigError: If it belongs to another source: a run has only one.
        """
        if state["name"] != self.name:
            raise ConfigError(
                f"segmentation={self.name}: this run has masks from {state['name']}. Resume it "
                f"with segmentation={state['name']}, or start another run."
            )
        self.frames = state["frames"]
        self._sums, self._counts = dict(state.get("sums", {})), dict(state.get("counts", {}))

    def _drop_masks(self, records: TensorDictBase) -> TensorDictBase:
        # Whether a mask is dropped depends only on the frame's number in the run, so that a resumed
        # run drops the same ones. The counter of Philox advances by four numbers at a time.
        numbers = np.random.Philox(key=self.seed).advance(self.frames)
        draws = np.random.Generator(numbers).random((len(records), 4))[:, 0]
        kept = torch.from_numpy(draws >= self.mask_dropout).to(records[NEXT_MASK].device)
        true_masks = records[NEXT_MASK]
        records = records.copy()
        records[NEXT_MASK] = true_masks & kept[:, None, None, None]
        self._note("iou", float(mask_iou(records[NEXT_MASK], true_masks).sum()), len(records))
        return records

    def _note(self, name: str, total: float, count: int) -> None:
        if count:
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + count


class SegmentedSource(MaskSource):
    """Masks from a segmenter, which segments each frame once before it enters the replay.

    Args:
        name: Name of the source, as in ``segmentation.source``.
        segmenter: Returns bool masks.
    """

    def __init__(self, name: str, segmenter: Segmenter) -> None:
        super().__init__(name)
        self.segmenter = segmenter
        self._transform = ForegroundMaskTransform(segmenter, [PIXELS])

    def label(self, records: TensorDictBase) -> TensorDictBase:
        """Segment all records in one call, and compare with the simulator's masks."""
        true_masks = records.get(NEXT_MASK, None)
        start = time.perf_counter()
        records = self.segment(records)
        self._note("milliseconds", 1e3 * (time.perf_counter() - start), len(records))
        if true_masks is not None:
            self._note("iou", float(mask_iou(records[NEXT_MASK], true_masks).sum()), len(records))
        return super().label(records)

    def segment(self, records: TensorDictBase) -> TensorDictBase:
        """Segment records in one call."""
        return self._transform(records.copy())

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, and the background that was learned."""
        state = super().state_dict()
        if isinstance(self.segmenter, MedianSegmenter):
            state["background"] = self.segmenter.background
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state."""
        super().load_state_dict(state)
        if isinstance(self.segmenter, MedianSegmenter):
            self.segmenter.background = state["background"].cpu()


class TaughtSource(SegmentedSource):
    """A student that segments all frames and learns from every k-th, which its teacher labels.

    Further metrics: ``segmentation/agreement``, the IoU of student and teacher on the frames that
    the teacher labelled, before the student learned from them; ``segmentation/teacher_share``, the
    labelled share of all frames so far; ``segmentation/teacher_milliseconds`` per labelled frame.

    Args:
        student: The trained student.
        teacher: Labels frames; None uses the simulator's masks.
        every: k; 0 disables the teacher.
        refit_steps: Gradient steps after every 200 frames that the teacher labels.
        pool: Frames and masks that the student has learned from so far, or None.
        capacity: Maximum number of labelled frames kept; later ones replace random ones.
        seed: Seed of the replacement and of the training.
    """

    def __init__(
        self,
        student: StudentSegmenter,
        *,
        teacher: Segmenter | None,
        every: int,
        refit_steps: int,
        pool: tuple[Tensor, Tensor] | None = None,
        capacity: int = 4000,
        seed: int = 0,
    ) -> None:
        super().__init__("student", student)
        self.student = student
        self.teacher = teacher
        self.every = every
        self.refit_steps = refit_steps
        self.capacity = capacity
        self.seed = seed
        self.labelled_by_teacher = 0
        """Frames that the teacher labelled during the run."""
        self.pool = pool
        self._new = 0

    def label(self, records: TensorDictBase) -> TensorDictBase:
        """Segment all records with the student, and label every k-th with the teacher."""
        true_masks = records.get(NEXT_MASK, None)
        chosen = torch.zeros(0, dtype=torch.int64)
        if self.every:  # the frames of this call whose number in the run is a multiple of k
            first = -self.frames % self.every
            chosen = torch.arange(len(records))[first :: self.every]
        records = super().label(records)
        if chosen.numel():
            frames = records[PIXELS][chosen]
            start = time.perf_counter()
            labels = true_masks[chosen] if self.teacher is None else self.teacher(frames)
            self._note("teacher_milliseconds", 1e3 * (time.perf_counter() - start), len(chosen))
            agreement = mask_iou(records[NEXT_MASK][chosen], labels)
            self._note("agreement", float(agreement.sum()), len(chosen))
            self._learn(frames, labels)
        return records

    def metrics(self) -> dict[str, float]:
        """Return the metrics since the last call."""
        share = self.labelled_by_teacher / max(self.frames, 1)
        return super().metrics() | {"segmentation/teacher_share": share}

    def learned(self) -> Iterable[Tensor]:
        """Return the student's weights and statistics."""
        weights: Iterable[Tensor] = self.student.state_dict().values()
        return weights

    def save_student(self, path: Path) -> None:
        """Write the student; see :meth:`~w2f_torchrl.segmenters.StudentSegmenter.save`."""
        self.student.save(path)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, the student, and the labelled frames that it learns from."""
        network = {
            "widths": self.student.network.widths,
            "network": self.student.state_dict(),
            "threshold": self.student.threshold,
        }
        frames = {"pool": self.pool, "new": self._new}
        counts = {"labelled_by_teacher": self.labelled_by_teacher}
        return super().state_dict() | counts | network | frames

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state."""
        super().load_state_dict(state)
        former = state.get("taught", 0)  # the key in checkpoints of older versions
        self.labelled_by_teacher = state.get("labelled_by_teacher", former)
        self.student.load_state_dict(state["network"])
        self._new = state.get("new", 0)
        if state.get("pool") is not None:  # missing in checkpoints of format version 1
            self.pool = state["pool"]

    def _learn(self, frames: Tensor, masks: Tensor) -> None:
        self._keep(frames, masks)
        self.labelled_by_teacher += len(frames)
        self._new += len(frames)
        if self._new < REFIT_FRAMES:
            return
        self._new = 0
        assert self.pool is not None
        train_student(
            *self.pool,
            steps=self.refit_steps,
            learning_rate=1e-3,
            seed=self.seed + self.labelled_by_teacher,
            device=self.student.device,
            student=self.student,
        )

    def _keep(self, frames: Tensor, masks: Tensor) -> None:
        if self.pool is None:
            self.pool = frames.clone(), masks.clone()
            return
        room = max(self.capacity - len(self.pool[0]), 0)
        generator = torch.Generator().manual_seed(self.seed + self.labelled_by_teacher)
        places = torch.randperm(len(self.pool[0]), generator=generator)[: len(frames[room:])]
        for old, new in zip(self.pool, (frames, masks), strict=True):
            old[places] = new[room:][: len(places)]
        self.pool = tuple(  # type: ignore[assignment]
            torch.cat([old, new[:room]])
            for old, new in zip(self.pool, (frames, masks), strict=True)
        )
