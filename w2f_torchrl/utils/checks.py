"""Checks of single values: the type and range of a number, a flag, one of a few words."""

from __future__ import annotations

import math

LARGEST_INTEGER = 2**63 - 1
"""The largest integer that tensors and files can hold."""


def check_number(
    name: str,
    value: object,
    *,
    integer: bool = False,
    odd: bool = False,
    optional: bool = False,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> None:
    """Check a number; nan and the infinities are never allowed.

    Args:
        name: Name of the setting, for the message.
        value: What the user gave.
        integer: Whether it must be an integer.
        odd: Whether it must be odd; needs one of the limits.
        optional: Whether null would be allowed; only for the message.
        minimum: Smallest allowed value.
        above: Value that must be exceeded.
        maximum: Largest allowed value.
        below: Value that must not be reached.

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
        or (odd and value % 2 == 0)
    ):
        allowed = describe_range(minimum, above, maximum, below)
        allowed = f"{'odd and ' if odd else ''}{allowed}{', or null' if optional else ''}"
        raise ValueError(f"{name}={value} must be {allowed}.")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check a setting that is one of a few words.

    Args:
        name: Name of the setting, for the message.
        value: What the user gave.
        allowed: The allowed words.

    Raises:
        ValueError: Naming the setting, its value and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(allowed)}.")


def check_flag(name: str, value: object) -> None:
    """Check a setting that is true or false.

    Args:
        name: Name of the setting, for the message.
        value: What the user gave.

    Raises:
        ValueError: Naming the setting and its value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false.")


def _check_type(name: str, value: object, *, integer: bool) -> None:
    wanted = int if integer else int | float
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ValueError(f"{name}={value!r} must be {'an integer' if integer else 'a number'}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number.")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError(f"{name} must be at most {LARGEST_INTEGER}, got a larger integer.")


def describe_range(
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> str:
    """Return a range in words; at least one of the limits must be given."""
    if maximum is None and below is None:
        return f"above {above:g}" if above is not None else f"at least {_shown(minimum)}"
    if minimum is None and above is None:
        return f"below {below:g}" if below is not None else f"at most {_shown(maximum)}"
    left = f"[{_shown(minimum)}" if above is None else f"({_shown(above)}"
    right = f"{_shown(maximum)}]" if below is None else f"{_shown(below)})"
    return f"in {left}, {right}"


def _shown(number: float | None) -> str:
    return f"{number}" if isinstance(number, int) else f"{number:g}"
