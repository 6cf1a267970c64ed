"""Named environments for evaluation: their distractions, and seen or unseen videos."""

from __future__ import annotations

from dataclasses import dataclass, replace

from w2f_torchrl.envs.protocols.dmcgb import (
    MODES,
    STAND_IN,
    distraction_of,
    required_data,
    source_of,
)
from w2f_torchrl.envs.scenery.backgrounds import ALL, PROCEDURAL
from w2f_torchrl.envs.scenery.distractions import (
    CORRUPTION,
    DIFFICULTIES,
    REACTIVE,
    CorruptionConfig,
    Distraction,
    DistractionConfig,
    parse_distraction,
)


@dataclass(frozen=True)
class EvaluationSet:
    """One way to distract an agent at evaluation.

    Attributes:
        name: Name in settings, metrics and tables.
        distraction: The distractions; None for none.
        split: Which of the source's clips to use, or which colours of scenery that reacts.
        source: Source of the clips; None for the run's source.
        as_run: Whether the distractions are the run's; ``distraction`` is then None.
        dmcgb: A test set of DMControl-GB whose data must be found first, see :meth:`resolved`.
    """

    name: str
    distraction: DistractionConfig | None = None
    split: str = "train"
    source: str | None = None
    as_run: bool = False
    dmcgb: str | None = None

    def background_source(self, run_source: str | None) -> str | None:
        """Return the ``background_source`` of an env of this set, None without a video."""
        if self.distraction is None or self.distraction.background is None:
            return None
        return self.source or run_source

    def resolved(self, run_distraction: Distraction, dmcgb_data: str | None) -> EvaluationSet:
        """Return the set for a run, with its distraction and the place of its data.

        Args:
            run_distraction: ``environment.distraction`` of the run.
            dmcgb_data: ``environment.dmcgb_data`` of the run.

        Raises:
            ValueError: If the run has no distraction, or the data is missing.
        """
        if self.as_run:
            own = parse_distraction(run_distraction)
            if own is None:
                raise ValueError(
                    f"{self.name} shows the run's own distraction with unseen scenery, but "
                    f"environment.distraction={run_distraction}."
                )
            return replace(self, distraction=own, as_run=False)
        if self.dmcgb is None:
            return self
        data = required_data(self.dmcgb, dmcgb_data)
        return replace(
            self,
            distraction=distraction_of(self.dmcgb, data),
            source=source_of(self.dmcgb, data),
            dmcgb=None,
        )

    @property
    def is_stand_in(self) -> bool:
        """Whether it takes the place of published data that it is not."""
        return self.name.endswith(STAND_IN)


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

    Then ``corruption``: only a camera that is disturbed at times; ``unseen``: the run's own
    distraction with validation clips or colours; and for each test set of DMControl-GB
    (``color_easy``, ``color_hard``, ``video_easy``, ``video_hard``):

    - ``dmcgb_color_easy``: from its data, which ``environment.dmcgb_data`` names;
    - ``dmcgb_color_easy_stand_in``: built-in colours or procedural clips instead, which are not the
      published ones.

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
    sets.append(EvaluationSet("unseen", split="val", as_run=True))
    for mode in MODES:
        sets.append(EvaluationSet(f"dmcgb_{mode}", split=ALL, dmcgb=mode))
        distraction, source = distraction_of(mode, None), source_of(mode, None)
        sets.append(EvaluationSet(f"dmcgb_{mode}_{STAND_IN}", distraction, "val", source))
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
