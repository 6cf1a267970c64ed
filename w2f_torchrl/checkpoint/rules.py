"""Which settings may be others at a resume than in the checkpoint, and why not.

:data:`RULES` is the only place that says so: a resume is checked against it, and
``docs/howto/resume.md`` shows it (:func:`resume_table`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Settings = Mapping[str, Any]


class Rule(NamedTuple):
    """What holds for some settings at a resume."""

    names: tuple[str, ...]
    """Settings, or groups of them with a dot at the end."""
    may_change: bool
    why: str
    """What follows from a change; or why there can be none."""


RULES = (
    Rule(
        ("algo.", "model."),
        False,
        "the networks have these parts and sizes: it would be another model",
    ),
    Rule(("model.preset",), True, "a name only; the sizes must stay"),
    Rule(
        ("environment.domain", "environment.task"),
        False,
        "the replay's records, with their rewards, and what was learned are of that task",
    ),
    Rule(
        ("environment.image_size",),
        False,
        "records and networks have pictures of that size: it would be another model",
    ),
    Rule(("environment.num_envs",), False, "the replay has a stream of records for each env"),
    Rule(
        ("environment.action_repeat",),
        False,
        "an action lasts that long in the replay's records and in the world model",
    ),
    Rule(
        ("environment.",),
        True,
        "how the task is seen and distracted: the envs begin new episodes, the replay keeps the "
        "old ones",
    ),
    Rule(
        ("segmentation.source",),
        False,
        "the replay's masks come from there (auto keeps what it chose)",
    ),
    Rule(("segmentation.",), True, "from the next frame on; a student keeps what it has learned"),
    Rule(("loss.", "optimizer."), True, "from the next update on; moments and statistics stay"),
    Rule(("training.batch_length",), False, "the replay's queue is of sequences of that length"),
    Rule(
        ("training.train_ratio", "training.batch_size"),
        False,
        "updates are counted by train_ratio / (batch_size x batch_length), and train_ratio, "
        "batch_size and batch_length must stay; both in proportion may change, and with another "
        "number of ranks either",
    ),
    Rule(("training.total_frames",), True, "a run is prolonged or shortened"),
    Rule(("training.prefill_steps",), True, "nothing, unless the replay has to fill again"),
    Rule(("training.",), True, "from the next update on"),
    Rule(
        ("distributed.",),
        True,
        "with another number of ranks all replays but rank 0's begin anew, and so do the episodes",
    ),
    Rule(("collection.num_workers", "collection.overlap"), True, "the envs begin new episodes"),
    Rule(("collection.",), True, "from the next batch on"),
    Rule(
        ("replay.capacity",),
        True,
        "a smaller replay keeps the newest records; they are written anew",
    ),
    Rule(("replay.",), True, "the records are taken over"),
    Rule(("evaluation.", "checkpoint.", "logging."), True, "from then on"),
    Rule(
        ("seed",),
        False,
        "random streams continue from the checkpoint: it would still be the run of the old seed",
    ),
    Rule(
        ("device",),
        True,
        "random streams of a device that isn't there any more begin anew",
    ),
    Rule(("run_dir", "resume"), True, "a run may be moved, renamed, or continued elsewhere"),
    Rule(("plugins",), True, "the files may be moved; the names that they register must stay"),
)


def flat_settings(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full names; a distraction's own fields stay together."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and not prefix:
            flat |= flat_settings(value, f"{name}.")
        else:
            flat[prefix + name] = value
    return flat


def rule_of(name: str) -> Rule:
    """The rule for a setting: the one that names it, else the one that names its group.

    Raises:
        KeyError: If there is none; a test sees to it that there is.
    """
    for wanted in (name, f"{name.split('.')[0]}."):
        for rule in RULES:
            if wanted in rule.names:
                return rule
    raise KeyError(name)


def forbidden_changes(saved: Settings, now: Settings) -> list[str]:
    """Say which settings have changed that must stay, in words.

    Settings that only one of two versions of this package knows are left out.

    Args:
        saved: A checkpoint's, nested.
        now: The run's.
    """
    before, after = flat_settings(saved), flat_settings(now)
    found = []
    for name in sorted(before.keys() & after.keys()):
        rule = rule_of(name)
        if before[name] == after[name] or rule.may_change or _is_allowed(name, before, after):
            continue
        found.append(f"{name}={after[name]} must stay {before[name]}: {rule.why}")
    return found


def _is_allowed(name: str, before: Settings, after: Settings) -> bool:
    """Whether a change is judged elsewhere, or is made good by another one."""
    if name == "segmentation.source":  # by name of what makes the masks: check_same_source
        return True
    ratio, batch = "training.train_ratio", "training.batch_size"
    if name in (ratio, batch):
        same = before[ratio] * after[batch] == after[ratio] * before[batch]
        return bool(same or before.get("distributed.ranks", 1) != after["distributed.ranks"])
    return False


def resume_table() -> str:
    """The rules as a Markdown table."""
    rows = ["| setting | may be another at a resume | |", "|---|---|---|"]
    for rule in RULES:
        names = ", ".join(
            f"`{name}*`" if name.endswith(".") else f"`{name}`" for name in rule.names
        )
        rows.append(f"| {names} | {'yes' if rule.may_change else 'no'} | {rule.why} |")
    return "\n".join(rows)
