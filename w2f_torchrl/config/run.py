"""A run's settings, checked, frozen, and read from and written to other forms."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from w2f_torchrl.config.groups import RunSettings
from w2f_torchrl.config.validation import ConfigError, validate
from w2f_torchrl.envs.scenery.distractions import DistractionConfig
from w2f_torchrl.utils.checks import check_choice as check_choice
from w2f_torchrl.utils.files import atomic_path


@dataclass
class RunConfig(RunSettings):
    """Every setting of a run."""

    def validated(self, *, ranks: int = 1) -> RunConfig:
        """Return a validated, frozen copy for a run of so many processes.

        Raises:
            ConfigError: If a setting is out of range.
        """
        if self.frozen and self.distributed.ranks == ranks:
            return self
        config = self.thawed()
        config.distributed.ranks = ranks
        if isinstance(config.environment.distraction, DistractionConfig):
            # As in a YAML file: config.yaml and checkpoints hold plain values.
            config.environment.distraction = asdict(config.environment.distraction)
        config.validate()
        return config.freeze()

    def with_masks_from(self, source: str) -> RunConfig:
        """Return settings that say which source ``segmentation=auto`` chose."""
        chosen = source if self.segmentation.source == "auto" else None
        return self.thawed(segmentation=self.segmentation.thawed(chosen=chosen)).freeze()

    def validate(self) -> None:
        """Check every setting before anything is built.

        Raises:
            ConfigError: Naming the setting, its value and what is allowed.
        """
        try:
            validate(self)
        except ConfigError:
            raise
        except (ValueError, OSError) as error:  # OSError: an impossible path
            raise ConfigError(str(error)) from error


def to_run_config(config: DictConfig | dict[str, Any]) -> RunConfig:
    """Build a typed configuration from Hydra's, or from a run's config.yaml.

    Raises:
        ConfigError: Naming the key that is unknown or has a value of the wrong type.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), config)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        first = str(error.msg or error).partition("\n")[
            0
        ]  # the rest is about OmegaConf's internals
        name = error.full_key or error.key or _setting_of_another_kind(config)
        raise ConfigError(f"{name}: {first}") from error


def _setting_of_another_kind(config: DictConfig | dict[str, Any]) -> str:
    """Return the setting that OmegaConf does not name, such as a mapping instead of a list."""
    for group, settings in config.items():
        for name, value in settings.items() if isinstance(settings, dict | DictConfig) else ():
            try:
                OmegaConf.merge(OmegaConf.structured(RunConfig), {group: {name: value}})
            except OmegaConfBaseException:
                return ".".join((str(group), str(name)))
    return "a setting"


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the configuration as YAML; an existing file is replaced atomically."""
    with atomic_path(path) as temporary:
        OmegaConf.save(OmegaConf.structured(config), temporary)
