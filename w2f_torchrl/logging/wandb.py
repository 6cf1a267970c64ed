"""Weights & Biases, through TorchRL's logger."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor
from torchrl.record.loggers.wandb import WandbLogger

from w2f_torchrl.utils.files import write_text

WandbMode = Literal["auto", "online", "offline"]
INIT_SECONDS = 60.0
"""How long a run waits for wandb's server when it starts."""

FINISH_SECONDS = 120.0
"""How long a run waits for the upload when it ends."""

STATE_NAME = "wandb_run.json"

logger = logging.getLogger(__name__)

_SECRET = re.compile(r"(^|_)(api_?key|key|token|secret|password|passwd|credentials?)($|_)", re.I)


class RunWandbLogger(WandbLogger):
    """TorchRL's wandb logger, which continues its run after a resume.

    wandb numbers the rows of a run. An offline run does not know how many there were before a
    resume, and rows numbered from zero again are dropped when they are uploaded. The number of rows
    is therefore stored with the run's id in ``run_dir/wandb_run.json``.

    Each group of metrics has the axis ``<group>/step``, environment frames.

    Args:
        exp_name: The run's name.
        state_path: File of the id and the number of rows.
        mode: ``"online"`` or ``"offline"``.
        kwargs: TorchRL's.
    """

    def __init__(
        self,
        exp_name: str,
        *,
        state_path: Path,
        mode: Literal["online", "offline"],
        **kwargs: Any,
    ) -> None:
        self._state_path, self._kept_in = state_path, state_path.parent / "wandb"
        state = _read_state(state_path)
        self._rows = state["rows"]
        # Without create_new a second run of this process would be written into the first. TorchRL's
        # `offline` sets WANDB_MODE permanently, and thus for later runs too.
        super().__init__(exp_name, id=state["id"], mode=mode, reinit="create_new", **kwargs)
        self.offline = mode == "offline"
        # Online, wandb knows how many rows the run has.
        self._rows = max(self._rows, int(self.experiment.step))

    def log_image(self, name: str, picture: Tensor, *, step: int) -> None:
        """Log an image, uint8 ``[3, H, W]``."""
        import wandb

        self._log_payload({name: wandb.Image(picture.permute(1, 2, 0).numpy())}, step=step)

    def log_histogram(self, name: str, data: Any, *, step: int | None = None) -> None:
        """Log the histogram of values ``[N]``."""
        super().log_histogram(name, data, step=step, bins=64)

    def log_video_file(
        self, name: str, path: Path, video: Tensor, *, step: int, fps: float
    ) -> None:
        """Log an MP4 file unchanged, instead of encoding the video again."""
        del video, fps
        import wandb

        self._log_payload({name: wandb.Video(str(path), format="mp4")}, step=step)

    def shutdown(self, timeout: float | None = None) -> None:
        """Finish the run; give up after :data:`FINISH_SECONDS` if the server does not respond.

        All logged data is in ``run_dir/wandb`` in any case.
        """
        given_up = threading.Event()

        def finish() -> None:
            try:
                WandbLogger.shutdown(self, timeout)
            except Exception as error:  # noqa: BLE001  # wandb has many kinds
                if not given_up.is_set():  # otherwise the interpreter's exit interrupted it
                    logger.warning("wandb did not finish: %s. %s", error, kept)

        kept = f"The data is kept; upload it later: wandb sync {self._kept_in / '*run-*'}"
        finishing = threading.Thread(target=finish, daemon=True)
        finishing.start()
        finishing.join(FINISH_SECONDS)
        if finishing.is_alive():
            given_up.set()
            logger.warning("wandb's server does not respond. %s", kept)

    def _log_payload(
        self,
        payload: dict[str, Any],
        *,
        step: int | None = None,
        override_global_step: bool = False,
        **kwargs: Any,
    ) -> None:
        if override_global_step:
            super()._log_payload(payload, step=step, override_global_step=True, **kwargs)
            return
        payload = self._prepare_payload(payload, step)
        self._register_metrics(payload)
        self.experiment.log(payload, step=self._rows, commit=True)
        self._rows += 1
        _write_state(self._state_path, {"id": self.id, "rows": self._rows})


def make_wandb_logger(
    run_dir: str | os.PathLike[str],
    *,
    project: str,
    entity: str | None = None,
    config: Mapping[str, Any] | None = None,
    mode: WandbMode = "auto",
    name: str | None = None,
    group: str | None = None,
) -> RunWandbLogger:
    """Build the wandb logger of a run.

    The wandb run's id is stored in ``run_dir/wandb_run.json``, so that a resumed run continues the
    same wandb run. Local paths (interpreter, editable installs) are not sent. If the server cannot
    be reached, the run is logged offline, with a warning that has the command for the upload.

    Args:
        run_dir: The run's directory; wandb's files are written there too.
        project: wandb project.
        entity: wandb user or team; None for the account's default.
        config: The run's settings as plain values. wandb reads its key from ``wandb login`` or
            the environment, never from here.
        mode: ``"online"``, ``"offline"``, or ``"auto"``: the value of ``WANDB_MODE`` if set,
            otherwise online if a key is configured, and offline if not.
        name: Name of the run; None for the name of ``run_dir``.
        group: Group of the run, for example its settings without the seed.

    Returns:
        The logger.

    Raises:
        ModuleNotFoundError: If wandb or moviepy is missing; the message has the install command.
        ValueError: If ``mode`` is unknown, or ``config`` has an entry named like a secret.
    """
    if mode not in get_args(WandbMode):
        raise ValueError(f"wandb mode {mode!r} is unknown; allowed: {get_args(WandbMode)}.")
    missing = [pkg for pkg in ("wandb", "moviepy") if importlib.util.find_spec(pkg) is None]
    if missing:
        raise ModuleNotFoundError(
            f"logging.use_wandb=true needs {' and '.join(missing)}: pip install 'wandb>=0.31' "
            "moviepy"
        )
    _refuse_secrets(config or {}, "config")
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "state_path": run_dir / STATE_NAME,
        "save_dir": run_dir,
        "project": project,
        "log_env_packages": False,
        "entity": entity,
        "group": group,
        "config": dict(config or {}),
    }
    name = name or run_dir.resolve().name
    if choose_mode(mode) == "online":
        online = _try_online(name, settings)
        if online is not None:
            return online
        logger.warning(
            "wandb cannot be reached: this run is logged offline. Upload it later: wandb sync %s",
            run_dir / "wandb" / "offline-run-*",
        )
    else:
        logger.info("wandb is offline; upload: wandb sync %s", run_dir / "wandb" / "offline-run-*")
    return RunWandbLogger(name, mode="offline", **settings)


def choose_mode(mode: WandbMode) -> Literal["online", "offline"]:
    """Resolve the mode ``"auto"``.

    Args:
        mode: The setting.
    """
    if mode != "auto":
        return mode
    chosen = os.environ.get("WANDB_MODE")
    if chosen:
        return "online" if chosen in ("online", "shared") else "offline"
    from wandb.sdk.lib import wbauth
    from wandb.sdk.wandb_setup import singleton

    found = wbauth.authenticate_session(
        host=singleton().settings.base_url, source="w2f_torchrl", prompt=False, update_session=False
    )
    return "offline" if found is None else "online"


def _try_online(name: str, settings: dict[str, Any]) -> RunWandbLogger | None:
    """Make an online logger; return None if the server does not answer in time."""
    import wandb

    limits = wandb.Settings(init_timeout=INIT_SECONDS)
    try:
        return RunWandbLogger(name, mode="online", settings=limits, **settings)
    except wandb.errors.CommError as error:
        logger.warning("wandb: %s", error)
    wandb.teardown()  # otherwise the service keeps trying
    return None


def read_wandb_run(run_dir: Path) -> str | None:
    """Return the id and rows of the run at wandb as JSON; None if the file is lost or damaged."""
    try:
        text = (run_dir / STATE_NAME).read_text()
        json.loads(text)
    except (OSError, ValueError):
        return None
    return text


def restore_wandb_run(run_dir: Path, text: str | None) -> None:
    """Write back what :func:`read_wandb_run` returned, if the file is lost or damaged."""
    if text and read_wandb_run(run_dir) is None:
        write_text(run_dir / STATE_NAME, text)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        return {"id": str(state["id"]), "rows": int(state["rows"])}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        logger.warning("%s is damaged: the run continues as a new one at wandb", path)
    old = path.with_name("wandb_id.txt")  # of version 0.1
    state = {"id": old.read_text().strip() if old.exists() else uuid.uuid4().hex, "rows": 0}
    _write_state(path, state)
    return state


def _write_state(path: Path, state: dict[str, Any]) -> None:
    write_text(path, json.dumps(state))


def _refuse_secrets(config: Mapping[str, Any], place: str) -> None:
    for key, value in config.items():
        if _SECRET.search(str(key)) and value is not None:
            raise ValueError(f"{place}.{key} looks like a secret and would be sent to wandb.")
        _refuse_secrets_within(value, f"{place}.{key}")


def _refuse_secrets_within(value: Any, place: str) -> None:
    if isinstance(value, Mapping):
        _refuse_secrets(value, place)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for index, item in enumerate(value):
            _refuse_secrets_within(item, f"{place}[{index}]")
