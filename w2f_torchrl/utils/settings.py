"""Settings as dataclass fields that carry their help, unit and allowed values as metadata.

Validation (:func:`check_fields`) and the documentation (``scripts/settings_reference.py``) read the
same metadata, so neither repeats a range. Torch is not imported.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self, TypeVar, cast

from w2f_torchrl.registry import Registry
from w2f_torchrl.utils.checks import check_choice, check_flag, check_number, describe_range

T = TypeVar("T")

Unit = Literal[
    "action",
    "agent steps",
    "blocks",
    "bins",
    "categoricals",
    "cells",
    "channels",
    "checkpoints",
    "classes",
    "clips",
    "colour levels",
    "control steps",
    "environments",
    "episodes",
    "evaluations",
    "factor",
    "failures",
    "features",
    "frames",
    "gradient steps",
    "index",
    "layers",
    "nats",
    "number",
    "pixels",
    "probability",
    "processes",
    "rate",
    "records",
    "restarts",
    "seconds",
    "seed",
    "sequences",
    "share",
    "units",
    "updates",
    "weight",
    "windows",
]

_KEY = "w2f_torchrl.setting"


@dataclasses.dataclass(frozen=True)
class SettingInfo:
    """Describe a setting: what it means and which values it allows.

    Attributes:
        help: Sentences for the documentation.
        unit: What a number counts or measures.
        minimum: Smallest allowed value.
        above: Value that must be exceeded.
        maximum: Largest allowed value.
        below: Value that must not be reached.
        odd: Whether the number must be odd; needs one of the limits.
        choices: Allowed words; empty if any are allowed.
        option: Name on the command line, if it is not ``group.field``.
        registry: The names that are allowed: ``choices``, and those that are registered.
    """

    help: str
    unit: Unit | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    odd: bool = False
    choices: tuple[str, ...] = ()
    option: str | None = None
    registry: Registry[Any] | None = None

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by their names."""
        names = ("minimum", "above", "maximum", "below")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def range(self) -> str:
        """The allowed range in words; empty if any number is allowed."""
        if not self.limits:
            return ""
        return f"{'odd and ' if self.odd else ''}{describe_range(**self.limits)}"


class Settings:
    """Base of the settings' dataclasses, whose instances can be frozen.

    Settings are written until they are validated; afterwards everything only reads them.
    """

    # Not in an instance's __dict__, which holds its settings and nothing else.
    __slots__ = ("_frozen",)

    @property
    def frozen(self) -> bool:
        """Whether attributes can no longer be set."""
        return bool(getattr(self, "_frozen", False))

    def freeze(self: Self) -> Self:
        """Refuse to set any attribute from now on, in nested settings too; return the instance."""
        for value in vars(self).values():
            if isinstance(value, Settings):
                value.freeze()
        object.__setattr__(self, "_frozen", True)
        return self

    def thawed(self: Self, **changes: Any) -> Self:
        """Return a copy whose attributes can be set, nested settings included.

        Args:
            **changes: Values of the copy's fields.
        """
        values = {
            field.name: copy.deepcopy(value)
            if not isinstance(value := getattr(self, field.name), Settings)
            else value.thawed()
            for field in dataclasses.fields(cast(Any, self))
        }
        return type(self)(**(values | changes))

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute.

        Raises:
            dataclasses.FrozenInstanceError: If the settings are frozen.
        """
        if self.frozen:
            raise dataclasses.FrozenInstanceError(
                f"cannot set {name}: the settings of a run stay as they were validated. Change a "
                "copy, from thawed()."
            )
        super().__setattr__(name, value)


def setting(
    default: T,
    help: str,
    *,
    unit: Unit | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    odd: bool = False,
    choices: tuple[str, ...] = (),
    option: str | None = None,
    registry: Registry[Any] | None = None,
) -> T:
    """Declare a dataclass field that is a setting.

    Args:
        default: The default value; a list or dictionary is copied for each instance.
        help: See :class:`SettingInfo`, as for all other arguments.
        unit: The unit of a number.
        minimum: Smallest allowed value.
        above: Value that must be exceeded.
        maximum: Largest allowed value.
        below: Value that must not be reached.
        odd: Whether the number must be odd.
        choices: Allowed words.
        option: Name on the command line, if it is not ``group.field``.
        registry: The allowed names, instead of ``choices``.

    Returns:
        A ``dataclasses.field``, typed as its default for the type checker.
    """
    info = SettingInfo(
        help=help,
        unit=unit,
        minimum=minimum,
        above=above,
        maximum=maximum,
        below=below,
        odd=odd,
        choices=choices if registry is None else registry.builtin,
        option=option,
        registry=registry,
    )
    metadata = {_KEY: info}
    if isinstance(default, list | dict):
        return cast(T, dataclasses.field(default_factory=default.copy, metadata=metadata))
    return dataclasses.field(default=default, metadata=metadata)


def info_of(field: dataclasses.Field[Any]) -> SettingInfo | None:
    """Return the metadata of a field, or None if it was not made by :func:`setting`."""
    info: SettingInfo | None = field.metadata.get(_KEY)
    return info


def type_of(field: dataclasses.Field[Any]) -> str:
    """Return the declared type of a field as it is written in the source."""
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


def is_number(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field holds a number, or a list of numbers."""
    return re.search(r"\b(int|float)\b", type_of(field)) is not None


def check_fields(group: str, config: Any) -> None:
    """Check the values of a dataclass against the types, ranges and choices of its fields.

    Args:
        group: Name of the group of settings, for the messages; empty for the top level.
        config: An instance of the dataclass.

    Raises:
        ValueError: Naming the first wrong setting, its value and what is allowed.
    """
    for field in dataclasses.fields(config):
        info = info_of(field) or SettingInfo(help="")
        name = info.option or f"{group}.{field.name}".lstrip(".")
        kinds = type_of(field).split(" | ")
        optional = "None" in kinds
        value = getattr(config, field.name)
        if value is None and optional:
            continue
        if "bool" in kinds:
            check_flag(name, value)
        for key, number in _numbers(value, kinds, info):
            check_number(
                f"{name}.{key}" if key else name,
                number,
                integer=not any("float" in kind for kind in kinds),
                odd=info.odd,
                optional=optional,
                **info.limits,
            )
        if info.registry is not None:
            info.registry.check(value)
        elif info.choices:
            check_choice(name, value, info.choices)


def unregistered(group: str, config: Any) -> list[str]:
    """Return the settings of a group whose names are not registered, as ``group.field=name``.

    Args:
        group: Name of the group of settings.
        config: An instance of its dataclass.
    """
    found = []
    for field in dataclasses.fields(config):
        info, value = info_of(field), getattr(config, field.name)
        if info is None or info.registry is None or value is None:
            continue
        if value not in info.registry.names:
            found.append(f"{group}.{field.name}={value}")
    return found


def _numbers(
    value: object, kinds: list[str], info: SettingInfo
) -> Iterator[tuple[str | None, object]]:
    """Yield the values that must be numbers: the value, or the items of a collection with limits.

    Items of a dictionary come with their keys.
    """
    if "int" in kinds or "float" in kinds:
        yield None, value
    elif info.limits and isinstance(value, Mapping):
        yield from value.items()
    elif info.limits and isinstance(value, list | tuple):
        yield from ((None, item) for item in value)
