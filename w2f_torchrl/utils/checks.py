"""The one check that every number of a configuration passes: its type, finite, within its range."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

LARGEST_INTEGER = 2**63 - 1
"""What tensors and files hold."""


def check_number(
    name: str,
    value: object,
    *,
    integer: bool = False,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> None:
    """Check a number; nan and the infinities are in no range.

    Args:
        name: Of the setting, for the message.
        value: What the user gave.
        integer: Whether it must be an integer.
        minimum: The least value that is allowed.
        above: A value that it must exceed.
        maximum: The greatest value that is allowed.
        below: A value that it must not reach.

    Raises:
        ValueError: Naming the setting, its value and what is allowed.
    """
    _check_type(name, value, integer=integer)
    assert isinstance(value, int | float), "checked"
    if (
        (minimum is not None and value < minimum)
        or (above is not None and value <= above)
        or (maximum is not None and value > maximum)
        or (below is not None and value >= below)
    ):
        raise ValueError(f"{name}={value} must be {_range(minimum, above, maximum, below)}.")


def check_fields(group: str, config: Any) -> None:
    """Check that every field of a dataclass that is a number or a flag holds one.

    Args:
        group: The name of the group of settings, for the messages.
        config: An instance of the dataclass.

    Raises:
        ValueError: Naming the first field that doesn't, its value and what is allowed.
    """
    for field in dataclasses.fields(config):
        name, value = f"{group}.{field.name}", getattr(config, field.name)
        declared = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        kinds = declared.split(" | ")
        if value is None and "None" in kinds:
            continue
        if "bool" in kinds and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false.")
        if "float" in kinds or "int" in kinds:
            _check_type(name, value, integer="float" not in kinds)


def _check_type(name: str, value: object, *, integer: bool) -> None:
    wanted = int if integer else int | float
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ValueError(f"{name}={value!r} must be {'an integer' if integer else 'a number'}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number.")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError(f"{name} must be at most {LARGEST_INTEGER}, got a larger integer.")


def _range(
    minimum: float | None, above: float | None, maximum: float | None, below: float | None
) -> str:
    if maximum is None and below is None:
        return f"above {above:g}" if above is not None else f"at least {_shown(minimum)}"
    if minimum is None and above is None:
        return f"below {below:g}" if below is not None else f"at most {_shown(maximum)}"
    left = f"[{_shown(minimum)}" if above is None else f"({_shown(above)}"
    right = f"{_shown(maximum)}]" if below is None else f"{_shown(below)})"
    return f"in {left}, {right}"


def _shown(number: float | None) -> str:
    return f"{number}" if isinstance(number, int) else f"{number:g}"
