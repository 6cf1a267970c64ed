"""The domain of runs without an environment: all they have is recorded episodes."""

from __future__ import annotations

from typing import Any, NoReturn

DOMAIN = "recorded"
"""Value of ``environment.domain``; ``environment.task`` is then only a name."""


def make_recorded(task: str, **settings: Any) -> NoReturn:
    """Refuse to make an env.

    Raises:
        ValueError: Always.
    """
    del settings
    raise ValueError(
        f"environment.domain={DOMAIN} ({task}) has no environment to step, only episodes recorded "
        "elsewhere: name the environment, for example environment.domain=cartpole "
        "environment.task=swingup."
    )
