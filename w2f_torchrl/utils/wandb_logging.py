"""Weights & Biases, through TorchRL's logger."""

from __future__ import annotations

import importlib.util
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torchrl.record.loggers.common import Logger
from torchrl.record.loggers.wandb import WandbLogger

WandbMode = Literal["online", "offline"]

_SECRET = re.compile(r"(^|_)(api_?key|key|token|secret|password|passwd|credentials?)($|_)", re.I)


def make_wandb_logger(
    run_dir: str | os.PathLike[str],
    *,
    project: str,
    entity: str | None = None,
    config: Mapping[str, Any] | None = None,
    mode: WandbMode = "online",
    name: str | None = None,
) -> Logger:
    """Build TorchRL's wandb logger for a run.

    The wandb run's id is kept in ``run_dir/wandb_id.txt``, so a resumed run goes on in the same
    wandb run. Local paths (interpreter, editable installs) are not sent.

    Args:
        run_dir: The run's directory; wandb's files go there too.
        project: wandb project.
        entity: wandb user or team; None means the default of the account.
        config: The run's settings as plain values. wandb takes its key from ``wandb login`` or
            the environment, never from here.
        mode: ``"online"`` or ``"offline"``.
        name: Name of the run; None means the name of ``run_dir``.

    Returns:
        The logger.

    Raises:
        ModuleNotFoundError: If wandb or moviepy is missing; gives the command.
        ValueError: If ``mode`` is unknown, or ``config`` has an entry named like a secret.
    """
    if mode not in get_args(WandbMode):
        raise ValueError(f"wandb mode {mode!r} is unknown; allowed: {get_args(WandbMode)}.")
    missing = [pkg for pkg in ("wandb", "moviepy") if importlib.util.find_spec(pkg) is None]
    if missing:
        raise ModuleNotFoundError(
            f"logging.use_wandb=true needs {' and '.join(missing)}: pip install 'wandb>=0.19' "
            "moviepy"
        )
    _refuse_secrets(config or {}, "config")
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    return WandbLogger(
        name or run_dir.resolve().name,
        offline=mode == "offline",
        save_dir=run_dir,
        id=_run_id(run_dir),
        project=project,
        log_env_packages=False,
        entity=entity,
        config=dict(config or {}),
    )


def _run_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text().strip()


def _refuse_secrets(config: Mapping[str, Any], place: str) -> None:
    for key, value in config.items():
        if _SECRET.search(str(key)) and value is not None:
            raise ValueError(f"{place}.{key} looks like a secret and would be sent to wandb.")
        if isinstance(value, Mapping):
            _refuse_secrets(value, f"{place}.{key}")
