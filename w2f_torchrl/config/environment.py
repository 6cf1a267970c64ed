"""Settings of the environment, the algorithm and the masks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from w2f_torchrl.config.methods import METHODS
from w2f_torchrl.config.model import LATENTS
from w2f_torchrl.envs.renderers.drawing import RENDER_MODES
from w2f_torchrl.envs.scenery.backgrounds import ALL, SPLITS
from w2f_torchrl.envs.tasks import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE
from w2f_torchrl.registry import algorithms, losses, segmenters
from w2f_torchrl.utils.checks import check_choice as check_choice
from w2f_torchrl.utils.settings import Settings, setting

SEGMENTATIONS = segmenters.builtin
TEACHERS = ("simulator", "sam3")


@dataclass
class EnvironmentConfig(Settings):
    """The task and how it is rendered."""

    domain: str = setting(
        "walker",
        "Domain of the Control Suite; gym for Gymnasium's environments; or one added by "
        "`register_env`.",
    )
    task: str = setting("walk", "Task of the domain; for gym an id such as CartPole-v1.")
    kwargs: dict[str, Any] = setting(
        {},
        "Further arguments of `gymnasium.make`, or of a registered factory, by name: "
        "`environment.kwargs.continuous=false`. Empty for the Control Suite.",
    )
    num_envs: int = setting(
        4, "Number of environments stepped together, on each rank.", unit="environments", minimum=1
    )
    image_size: int = setting(
        64,
        "Side of the square image; a multiple of 16.",
        unit="pixels",
        minimum=MIN_IMAGE_SIZE,
        maximum=MAX_IMAGE_SIZE,
    )
    action_repeat: int = setting(
        2,
        "Control steps for which each action is held. ``frames`` count control steps.",
        unit="control steps",
        minimum=1,
    )
    camera_id: int | None = setting(
        None,
        "MuJoCo camera; null uses camera_name, or else 0, or 2 for quadruped and for the fetch "
        "task of dog, and for a Gymnasium env the camera of the pictures that it draws itself.",
        unit="index",
    )
    camera_name: str | None = setting(
        None, "MuJoCo camera by its name, in place of camera_id; null uses camera_id."
    )
    further_cameras: list[int] = setting(
        [],
        "Cameras of the Control Suite's model that are drawn too, without distractions: each adds "
        "pixels_camera_N, for ``model.pictures``, and its mask.",
        unit="index",
        minimum=0,
    )
    state_observations: bool = setting(
        False,
        "Add the Control Suite's own observations, such as position and velocity, for "
        "``model.vectors``.",
    )
    render: str = setting(
        "fast",
        "fast renders without multisampling, shadows and reflections; reference renders at the "
        "model's own quality, as dm_control does.",
        choices=RENDER_MODES,
    )
    foreground_include: list[str] = setting(
        [],
        "Foreground in addition to what moves and the task's targets, in the simulator's masks: "
        "names or patterns (`*`, `?`) of MuJoCo bodies, with what is attached to them, geoms or "
        "sites.",
    )
    foreground_exclude: list[str] = setting(
        [],
        "Background in spite of moving, likewise. The nearest name counts: the object's, its "
        "body's, then that of the body to which this one is attached, up to `world`.",
    )
    distraction: Any = setting(
        "none",
        "none; easy, medium or hard, as in the Distracting Control Suite; reactive_action, "
        "reactive_reward, reactive_time or reactive_action_time, a grid of colours that depends on "
        "these; corruption, a camera that is disturbed at times; or the fields of a "
        "DistractionConfig, for example {camera: {scale: 0.2}, step_unit: agent}.",
    )
    background_source: str | None = setting(
        None,
        "Background videos: a folder, davis, procedural or procedural:SEED. null uses procedural.",
    )
    background_split: str = setting(
        "train",
        "Which clips of the source to use, train, val or all; or which colours of scenery that "
        "reacts, train or val.",
        choices=(*SPLITS, ALL),
    )
    dmcgb_data: str | None = setting(
        None,
        "Data of DMControl-GB for the evaluation sets dmcgb_*: the folder src/env/data of a "
        "checkout. null uses dmcgb in the cache of clips, if it exists.",
    )
    action_range: list[float] | None = setting(
        None,
        "Lowest and highest action of a registered env whose spec has no limits; the policy's "
        "[-1, 1] is scaled to it. null uses the spec's limits.",
        unit="action",
    )


@dataclass
class AlgoConfig(Settings):
    """The algorithm."""

    name: str = setting(
        "world2filter",
        "world2filter; dreamer_v3: the same code with a single latent and no masks; or another of "
        "the methods that docs/methods.md compares.",
        registry=algorithms,
        option="algo",
    )
    latent: str | None = setting(
        "split",
        "split: one latent for the foreground, another for the background; shared: one latent that "
        "reconstructs both; foreground: one latent, the background is not reconstructed; null (one "
        "latent, no masks) for dreamer_v3; null for the other methods too, each of which has its "
        "own.",
        choices=LATENTS,
    )
    loss: str | None = setting(
        None,
        "A registered loss; null uses World2FilterLoss. `loss.extra.NAME=` sets the weight of an "
        "entry that the package does not have.",
        registry=losses,
    )

    def validate(self) -> None:
        """Raise ``ValueError`` if the algorithm does not have the latent, or the losses."""
        if self.name in METHODS:
            if self.latent is not None:
                raise ValueError(
                    f"algo.latent={self.latent!r} must be null with algo={self.name}, which has "
                    "its own latents; for split, shared or foreground use algo=world2filter."
                )
            if self.loss is not None and self.name != "dreamer_v3":
                raise ValueError(
                    f"algo.loss={self.loss!r} must be null with algo={self.name}, which has its "
                    "own losses; registered ones are for world2filter and dreamer_v3."
                )
        elif self.latent is not None or self.name in algorithms.builtin:
            check_choice("algo.latent", self.latent, LATENTS)


@dataclass
class SegmentationConfig(Settings):
    """The source of the training masks."""

    source: str = setting(
        "simulator",
        "simulator, sam3, student, median or auto. auto uses SAM3 if its package and weights are "
        "installed; otherwise the simulator's masks; otherwise a student, if there are labels or "
        "trained weights for it; otherwise the median.",
        registry=segmenters,
        option="segmentation",
    )
    chosen: str | None = setting(
        None, "The source that auto chose; written by the run and kept when it is resumed."
    )
    checkpoint: str | None = setting(
        None, "SAM3's weights, as source or as teacher; null downloads them from Hugging Face."
    )
    prompts: list[str] = setting(
        ["robot"], "Text prompts for SAM3; the masks of all prompts are united."
    )
    resolution: int | None = setting(
        None,
        "Side of the image that SAM3 receives, a multiple of 336; null uses the resolution of the "
        "weights.",
        unit="pixels",
    )
    score_threshold: float = setting(
        0.5, "Minimum score of a SAM3 detection.", unit="probability", minimum=0, maximum=1
    )
    batch_size: int = setting(
        32, "Maximum number of frames per SAM3 forward pass.", unit="frames", minimum=1
    )
    compile: bool = setting(False, "Compile SAM3's vision trunk.")
    vocabulary: str | None = setting(
        None, "Vocabulary file of SAM3's tokenizer; null uses the one in open_clip."
    )
    student_checkpoint: str | None = setting(
        None,
        "A trained student (student.pt of a run); null trains one when the run starts.",
    )
    labels: str | None = setting(
        None,
        "Labelled frames for the student: an .npz file with pixels and masks; null asks the "
        "teacher.",
    )
    backgrounds: str | None = setting(
        None,
        "Images onto which the student's foregrounds are pasted: an .npz file with pixels, or "
        "clips in the form of environment.background_source (a folder, davis, procedural:SEED).",
    )
    teacher: str = setting(
        "simulator", "The student's teacher: simulator or sam3.", choices=TEACHERS
    )
    teacher_frames: int = setting(
        2000,
        "Frames of a random policy, chosen for diversity, that the student is first trained on.",
        unit="frames",
        minimum=1,
    )
    teacher_every: int = setting(
        100,
        "During collection the teacher labels one frame out of this many; 0 disables it.",
        unit="frames",
        minimum=0,
    )
    train_steps: int = setting(
        700,
        "Gradient steps of the student when the run starts. A tenth as many follow after every 200 "
        "frames that the teacher labels.",
        unit="gradient steps",
        minimum=1,
    )
    threshold: int = setting(
        24,
        "Colour difference above which the median counts a pixel as foreground.",
        unit="colour levels",
        minimum=0,
        maximum=254,
    )
    mask_dropout: float = setting(
        0.0,
        "Share of frames whose simulator mask is emptied before it reaches the replay, to study "
        "imperfect masks. Evaluations use the true masks.",
        unit="share",
        minimum=0,
        below=1,
    )
    lost: float | None = setting(
        None,
        "Former name of mask_dropout, accepted until the next release.",
        unit="share",
        minimum=0,
        below=1,
    )

    def __post_init__(self) -> None:
        """Accept the former name of ``mask_dropout``; older configurations hold it."""
        if self.lost:
            warnings.warn(
                "segmentation.lost was renamed and will be removed: use "
                f"segmentation.mask_dropout={self.lost}.",
                FutureWarning,
                stacklevel=3,  # the caller of the generated __init__
            )
            if self.mask_dropout:
                return  # validation refuses two values
            self.mask_dropout = self.lost
        self.lost = None

    @property
    def needs_sam3(self) -> bool:
        """Whether SAM3 is used, as the source or as the student's teacher."""
        if self.source == "student":
            return self.teacher == "sam3"
        return self.source == "sam3"
