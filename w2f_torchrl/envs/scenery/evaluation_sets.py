"""Named environments for evaluation: their distractions, and seen or unseen videos."""

from __future__ import annotations

from dataclasses import dataclass

from w2f_torchrl.envs.scenery.backgrounds import PROCEDURAL
from w2f_torchrl.envs.scenery.distractions import (
    CORRUPTION,
    DIFFICULTIES,
    REACTIVE,
    CorruptionConfig,
    DistractionConfig,
)


@dataclass(frozen=True)
class EvaluationSet:
    """One way to distract an agent at evaluation.

    Attributes:
        name: Name in settings, metrics and tables.
        distraction: The distractions; None for none.
        split: Which of the source's clips to use, or which colours of scenery that reacts.
        source: Source of the clips; None for the run's source.
    """

    name: str
    distraction: DistractionConfig | None = None
    split: str = "train"
    source: str | None = None

    def background_source(self, run_source: str | None) -> str | None:
        """Return the ``background_source`` of an env of this set, None without a video."""
        if self.distraction is None or self.distraction.background is None:
            return None
        return self.source or run_source


def evaluation_sets() -> dict[str, EvaluationSet]:
    """List the evaluation sets by name.

    ``clean``, and for each difficulty (``easy``, ``medium``, ``hard``):

    - ``train_videos_easy``: only the background, with the clips that a run of this difficulty and
      source is trained on;
    - ``unseen_videos_easy``: only the background, with the source's validation clips;
    - ``unseen_procedural_easy``: only the background, with procedural validation clips, whatever
      the run's source;
    - ``color_easy``, ``camera_easy``: only colours, or only the camera;
    - ``all_easy``: background with validation clips, camera and colours.

    Then, for each function of scenery that reacts (``action``, ``reward``, ``time``,
    ``action_time``):

    - ``reactive_action``: a grid with the colours of training;
    - ``unseen_reactive_action``: the same with other colours.

    Then ``corruption``: only a camera that is disturbed at times.

    Returns:
        The sets, in this order. For a run with procedural clips ``unseen_videos`` and
        ``unseen_procedural`` are the same clips.

    Examples:
        >>> list(evaluation_sets())[:3]
        ['clean', 'train_videos_easy', 'unseen_videos_easy']
    """
    sets = [EvaluationSet("clean")]
    for difficulty in DIFFICULTIES:
        sets += _sets_of(difficulty)
    for name, config in REACTIVE.items():
        distraction = DistractionConfig(reactive=config)
        sets.append(EvaluationSet(name, distraction))
        sets.append(EvaluationSet(f"unseen_{name}", distraction, "val"))
    sets.append(EvaluationSet(CORRUPTION, DistractionConfig(corruption=CorruptionConfig())))
    return {each.name: each for each in sets}


def _sets_of(difficulty: str) -> list[EvaluationSet]:
    video = DistractionConfig.of_difficulty(difficulty, camera=False, color=False)
    color = DistractionConfig.of_difficulty(difficulty, background=False, camera=False)
    camera = DistractionConfig.of_difficulty(difficulty, background=False, color=False)
    everything = DistractionConfig.of_difficulty(difficulty)
    return [
        EvaluationSet(f"train_videos_{difficulty}", video),
        EvaluationSet(f"unseen_videos_{difficulty}", video, "val"),
        EvaluationSet(f"unseen_procedural_{difficulty}", video, "val", PROCEDURAL),
        EvaluationSet(f"color_{difficulty}", color),
        EvaluationSet(f"camera_{difficulty}", camera),
        EvaluationSet(f"all_{difficulty}", everything, "val"),
    ]
