"""Settings that may change at a resume, and those that may not.

:data:`RULES` is the only source: a resume is checked against it, and ``docs/howto/resume.md`` shows
it (:func:`resume_table`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Settings = Mapping[str, Any]


class Rule(NamedTuple):
    """The rule for some settings at a resume."""

    names: tuple[str, ...]
    """Settings, or groups of settings with a dot at the end."""
    may_change: bool
    why: str
    """The effect of a change, or the reason why it is refused."""


RULES = (
    Rule(
        ("algo.", "model."),
        False,
        "they define the parts and sizes of the networks, so it would be another model",
    ),
    Rule(("model.preset",), True, "only a name; the sizes must stay the same"),
    Rule(
        ("environment.domain", "environment.task", "environment.kwargs"),
        False,
        "the replay's records and rewards, and the networks, belong to the old task",
    ),
    Rule(
        ("environment.image_size",),
        False,
        "records and networks have the old image size, so it would be another model",
    ),
    Rule(("environment.num_envs",), False, "the replay has one stream of records per env"),
    Rule(
        ("environment.action_repeat",),
        False,
        "the replay's records and the world model use the old action repeat",
    ),
    Rule(
        ("environment.",),
        True,
        "the view and the distractions change: the envs begin new episodes, the replay keeps the "
        "old ones",
    ),
    Rule(
        ("data.",),
        False,
        "the replay holds records that were read with the old settings",
    ),
    Rule(
        ("data.path",),
        False,
        "a run either collects or has recorded data; the same episodes may lie elsewhere",
    ),
    Rule(
        ("segmentation.source",),
        False,
        "the replay's masks come from the old source (auto keeps the source that it chose)",
    ),
    Rule(("segmentation.",), True, "applies from the next frame; a student keeps its weights"),
    Rule(
        ("loss.", "optimizer.", "repo.", "r2dreamer.", "tia.", "augmentation."),
        True,
        "applies from the next update; moments and statistics are kept",
    ),
    Rule(
        ("repo.initial_dual", "repo.dual_slowdown"),
        False,
        "the checkpoint holds the dual variable in units of its rate",
    ),
    Rule(("training.batch_length",), False, "the replay's queue holds sequences of the old length"),
    Rule(
        ("training.train_ratio", "training.batch_size"),
        False,
        "updates are counted by train_ratio / (batch_size x batch_length): train_ratio, batch_size "
        "and batch_length must not change, except train_ratio and batch_size in proportion, or "
        "either with another number of ranks",
    ),
    Rule(("training.total_frames",), True, "the run becomes longer or shorter"),
    Rule(("training.prefill_steps",), True, "has no effect, unless the replay has to fill again"),
    Rule(("training.",), True, "applies from the next update"),
    Rule(
        ("distributed.",),
        True,
        "with another number of ranks, the envs begin new episodes; with more ranks, all replays "
        "fill again",
    ),
    Rule(("collection.num_workers", "collection.overlap"), True, "the envs begin new episodes"),
    Rule(("collection.",), True, "applies from the next batch"),
    Rule(
        ("replay.capacity",),
        True,
        "a smaller replay keeps the newest records; they are written to new files",
    ),
    Rule(("replay.",), True, "the records are kept"),
    Rule(("evaluation.", "checkpoint.", "logging."), True, "applies from then on"),
    Rule(
        ("seed",),
        False,
        "random streams continue from the checkpoint, so it would still be the run of the old seed",
    ),
    Rule(
        ("device",),
        True,
        "random streams of a device that is no longer available start again",
    ),
    Rule(("run_dir", "resume"), True, "a run can be moved, renamed, or continued elsewhere"),
    Rule(("plugins",), True, "the files can be moved; the names that they register must stay"),
)


def flat_settings(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their full names; the fields of a distraction stay together."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and not prefix:
            flat |= flat_settings(value, f"{name}.")
        else:
            flat[prefix + name] = value
    return flat


def rule_of(name: str) -> Rule:
    """Return the rule that names a setting, or else the rule that names its group.

    Raises:
        KeyError: If none exists; a test checks that all settings have one.
    """
    for wanted in (name, f"{name.split('.')[0]}."):
        for rule in RULES:
            if wanted in rule.names:
                return rule
    raise KeyError(name)


def forbidden_changes(saved: Settings, now: Settings) -> list[str]:
    """Describe the forbidden changes of settings.

    Settings that exist in only one of the two are ignored, as they are of another version.

    Args:
        saved: Nested settings of a checkpoint.
        now: Nested settings of the run.
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
    """Return whether a change is checked elsewhere, or compensated by another one."""
    if name == "segmentation.source":  # compared as resolved: check_same_source
        return True
    if name == "data.path":  # the episodes are compared when they are opened
        return None not in (before[name], after[name])
    ratio, batch = "training.train_ratio", "training.batch_size"
    if name in (ratio, batch):
        same = before[ratio] * after[batch] == after[ratio] * before[batch]
        return bool(same or before.get("distributed.ranks", 1) != after["distributed.ranks"])
    return False


def resume_table() -> str:
    """Return the rules as a Markdown table."""
    rows = ["| setting | may change at a resume | |", "|---|---|---|"]
    for rule in RULES:
        names = ", ".join(
            f"`{name}*`" if name.endswith(".") else f"`{name}`" for name in rule.names
        )
        rows.append(f"| {names} | {'yes' if rule.may_change else 'no'} | {rule.why} |")
    return "\n".join(rows)
