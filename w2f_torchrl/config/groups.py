"""All groups of settings of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from w2f_torchrl.config.environment import AlgoConfig, EnvironmentConfig, SegmentationConfig
from w2f_torchrl.config.loss import LossConfig
from w2f_torchrl.config.methods import (
    METHODS,
    MethodConfig,
    R2DreamerConfig,
    RepoConfig,
    TiaConfig,
)
from w2f_torchrl.config.model import ModelConfig
from w2f_torchrl.config.output import CheckpointConfig, EvaluationConfig, LoggingConfig
from w2f_torchrl.config.training import (
    GRAPHED,
    AugmentationConfig,
    CollectionConfig,
    DataConfig,
    DistributedConfig,
    OptimizerConfig,
    ReplayConfig,
    TrainingConfig,
)
from w2f_torchrl.envs.recorded import DOMAIN as RECORDED
from w2f_torchrl.utils.checks import check_choice as check_choice
from w2f_torchrl.utils.settings import Settings, setting

if TYPE_CHECKING:
    import torch


@dataclass
class RunSettings(Settings):
    """Every setting of a run, and what follows from several of them."""

    algo: AlgoConfig = field(default_factory=AlgoConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    repo: RepoConfig = field(default_factory=RepoConfig)
    r2dreamer: R2DreamerConfig = field(default_factory=R2DreamerConfig)
    tia: TiaConfig = field(default_factory=TiaConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    collection: CollectionConfig = field(default_factory=CollectionConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = setting(0, "Seed from which all others are derived.", unit="seed", minimum=0)
    device: str = setting(
        "auto",
        "Where the model trains and acts: auto (cuda if available), cpu, cuda, cuda:1, ...",
    )
    run_dir: str = setting(
        "runs/latest",
        "Directory of the run: config.yaml, metrics.jsonl, checkpoints/, videos/, curves.png. On "
        "the command line the default is runs/ALGO_DOMAIN_TASK_SEED.",
    )
    resume: str | None = setting(
        None,
        "null starts a new run, and is refused if run_dir holds one; auto continues from the "
        "newest intact checkpoint, or starts a new run without one; or the path of a checkpoint "
        "or run.",
    )
    plugins: list[str] = setting(
        [],
        "Python files, or modules that Python can import, that register parts of a run; they "
        "are imported before the settings are checked, in worker processes too.",
    )

    @property
    def name(self) -> str:
        """Name of the run: ``{algo}_{domain}_{task}_{seed}``."""
        return f"{self.group}_{self.seed}"

    @property
    def group(self) -> str:
        """Name shared with the runs of other seeds: ``{algo}_{domain}_{task}``."""
        return f"{self.algo.name}_{self.environment.domain}_{self.environment.task}"

    @property
    def has_environment(self) -> bool:
        """Whether an environment can be played; otherwise only recorded episodes exist."""
        return self.environment.domain != RECORDED

    @property
    def latent(self) -> str:
        """The world model's latent: ``whole`` for DreamerV3."""
        if self.algo.name in METHODS:
            return METHODS[self.algo.name].latent
        return self.algo.latent or "whole"

    @property
    def needs_masks(self) -> bool:
        """Whether training needs masks."""
        if self.algo.name in METHODS:
            return METHODS[self.algo.name].trains_on_masks
        return self.latent != "whole"

    @property
    def acts_on_masks(self) -> bool:
        """Whether acting needs masks too."""
        return self.algo.name in METHODS and METHODS[self.algo.name].acts_on_masks

    @property
    def method(self) -> MethodConfig | None:
        """The group of settings that only this run's algorithm has; None without one."""
        group = getattr(self, self.algo.name, None)
        return group if isinstance(group, MethodConfig) else None

    @property
    def prefill_steps(self) -> int:
        """Agent steps before the first update, over all ranks."""
        if self.training.prefill_steps is not None:
            return self.training.prefill_steps
        sequences = max(self.training.batch_size, self.environment.num_envs)
        return self.distributed.ranks * sequences * self.training.batch_length

    @property
    def effective_batch_size(self) -> int:
        """Sequences per update, over all ranks."""
        return self.distributed.ranks * self.training.batch_size

    @property
    def gradients(self) -> str:
        """How ranks share gradients: ``none`` (one rank), ``ddp`` or ``flat``."""
        if self.distributed.ranks == 1:
            return "none"
        if self.distributed.gradients == "auto":
            graphed = self.training.execution in GRAPHED
            graphed |= self.training.execution == "auto" and self.torch_device().type == "cuda"
            return "flat" if graphed else "ddp"
        return self.distributed.gradients

    def torch_device(self) -> torch.device:
        """Return the device, with ``auto`` resolved; several ranks get one GPU each."""
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and self.distributed.ranks > 1:
            # A launcher may show each rank all GPUs of its machine, or only its own.
            alone = torch.cuda.device_count() == 1
            return torch.device("cuda", 0 if alone else int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device(name)
