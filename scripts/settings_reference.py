"""Every setting with type, unit, range, default and help, read from the fields' metadata.

docs/configuration.md shows it. The settings are the fields of ``RunConfig`` and of the dataclasses
below it; see ``w2f_torchrl/utils/settings.py`` for their metadata. Importing them loads no torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from w2f_torchrl.config import RunConfig
from w2f_torchrl.config.model import ModelConfig
from w2f_torchrl.config.presets import PRESETS
from w2f_torchrl.envs.scenery.distractions import DistractionConfig
from w2f_torchrl.utils.settings import SettingInfo, info_of, is_number, type_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "sota_configs"


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass."""

    name: str
    type: str
    default: str
    info: SettingInfo
    is_number: bool
    nested: type | None = None
    """The dataclass that holds the settings below this one."""

    @property
    def kind(self) -> str:
        """Type, unit and allowed values."""
        shown = self.type.replace(" | None", " or null")
        if self.info.choices:
            null = " or null" if self.type.endswith("None") else ""
            shown = f"one of {', '.join(self.info.choices)}{null}"
        if self.info.registry is not None:
            shown += " or a registered name"
        return ", ".join(filter(None, (shown, self.info.unit, self.info.range)))


def settings_of(config: type, prefix: str = "") -> Iterator[Setting]:
    """Yield the fields of a dataclass."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        yield Setting(
            prefix + field.name,
            type_of(field),
            _default(field),
            info_of(field) or SettingInfo(help=""),
            is_number(field),
            _dataclass_in(hints[field.name]),
        )


def _dataclass_in(hint: Any) -> type | None:
    kinds = [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)]
    return kinds[0] if kinds else None  # type: ignore[return-value]


def _default(field: dataclasses.Field[Any]) -> str:
    """The default as YAML writes it."""
    return _as_yaml(field.default if field.default is not MISSING else field.default_factory())


def _as_yaml(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_as_yaml(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def all_settings(config: type = RunConfig, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting below a dataclass by its full name: ``environment.image_size``."""
    for setting in settings_of(config, prefix):
        if setting.nested:
            yield from all_settings(setting.nested, f"{setting.name}.")
        else:
            yield setting


def distraction_settings() -> list[Setting]:
    """The fields that ``environment.distraction={...}`` takes."""
    settings = []
    for part in settings_of(DistractionConfig):
        settings.append(part)
        if part.nested:
            settings += settings_of(part.nested, f"{part.name}.")
    return settings


def table(settings: list[Setting]) -> str:
    """Settings as a Markdown table."""
    rows = ["| setting | type, unit, allowed | default | |", "|---|---|---|---|"]
    for setting in settings:
        cells = [f"`{setting.name}`", setting.kind, f"`{setting.default}`", setting.info.help]
        cells = [cell.replace("``", "`").replace("|", "\\|") for cell in cells]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def summary(config: type) -> str:
    """The first paragraph of a dataclass's docstring, without Sphinx roles."""
    text = " ".join((config.__doc__ or "").split("\n\n")[0].split())
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)


def options(group: Path) -> str:
    """The options of a Hydra group, with the comment at the top of each file."""
    name = group.relative_to(CONFIGS).as_posix()
    rows = ["| option | |", "|---|---|"]
    for path in sorted(group.glob("*.yaml")):
        lines = path.read_text().splitlines()
        texts = [line[1:].strip() for line in lines if line.startswith("#") and "@" not in line]
        rows.append(f"| `{name}={path.stem}` | {' '.join(texts)} |")
    return "\n".join(rows)


def presets() -> str:
    """The presets of ``model=`` with their sizes, foreground / background."""
    rows = ["| option | belief | hidden, units | classes | CNN depth |", "|---|---|---|---|---|"]
    for name, model in PRESETS.items():
        cells = [_both(model, size) for size in ("belief_size", "hidden_size")]
        cells += [_both(model, size) for size in ("num_classes", "cnn_depth")]
        rows.append(f"| `model={name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def _both(model: ModelConfig, size: str) -> str:
    return f"{getattr(model, size)} / {getattr(model, f'background_{size}')}"


def reference() -> str:
    """The whole reference, as Markdown below the page's own title."""
    groups = [setting for setting in settings_of(RunConfig) if setting.nested]
    top = [setting for setting in settings_of(RunConfig) if not setting.nested]
    parts = ["## The run", table(top)]
    for group in groups:
        assert group.nested is not None
        settings = list(all_settings(group.nested, f"{group.name}."))
        parts += [f"## {group.name}", summary(group.nested), table(settings)]
        if (CONFIGS / group.name).is_dir():
            parts.append(options(CONFIGS / group.name))
        if group.name == "model":
            parts += ["Foreground / background:", presets()]
    parts += ["## The fields of environment.distraction"]
    parts += [summary(DistractionConfig), table(distraction_settings())]
    shown = {group.name for group in groups}
    for folder in sorted({path.parent for path in CONFIGS.rglob("*.yaml")} - {CONFIGS}):
        if (name := folder.relative_to(CONFIGS).as_posix()) not in shown:
            parts += [f"## {name}", options(folder)]
    return "\n\n".join(parts) + "\n"
