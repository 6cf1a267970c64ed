"""Every setting with type, unit, default and help, read from the source and not imported.

docs/configuration.md shows it. The settings are the fields of ``RunConfig`` and of the dataclasses
below it; a field's help is the string below it, or its entry under "Attributes:" in the class's
docstring.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "sota_configs"
UNITS = {
    "agent steps": r"agent steps?",
    "control steps": r"control steps?",
    "gradient steps": r"gradient steps?",
    "updates": r"updates?",
    "frames": r"frames?",
    "pixels": r"pixels?",
    "records": r"records?",
    "sequences": r"sequences?",
    "episodes": r"episodes?",
    "environments": r"environments?",
    "processes": r"process(es)?",
    "GPUs": r"gpus?",
    "seconds": r"seconds?",
    "milliseconds": r"milliseconds?",
    "bytes": r"bytes?|GiB|MiB",
    "checkpoints": r"checkpoints?",
    "windows": r"windows?",
    "videos": r"videos?|clips?",
    "layers": r"layers?",
    "features": r"features?",
    "units": r"units?",
    "channels": r"channels?",
    "classes": r"classes",
    "blocks": r"blocks?",
    "bins": r"bins?",
    "nats": r"nats",
    "grey levels": r"grey levels?",
    "index": r"index|camera",
    "seed": r"seed",
    "weight": r"weight(?! decay)",
    "rate": r"rate",
    "factor": r"factors?",
    "share": r"share",
    "count": r"count|number of",
    "plain number": r"plain number",
}
"""A number's unit is the first of these that its help names, or the range that it gives."""
RANGE = r"[\[(]-?[\d.]+, [^\])]+[\])]"


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass."""

    name: str
    type: str
    default: str
    help: str
    nested: str | None = None
    """The dataclass that holds the settings below this one."""

    @property
    def is_number(self) -> bool:
        """Whether its value is a number, or a list of numbers."""
        return re.search(r"\b(int|float)\b", self.type) is not None

    @property
    def unit(self) -> str:
        """What its number counts; empty if the help doesn't say, or if it is no number."""
        if not self.is_number:
            return ""
        in_range = re.search(RANGE, self.help)
        if in_range and "float" in self.type:
            return f"in {in_range[0]}"
        found = []
        for unit, pattern in UNITS.items():
            match = re.search(rf"\b({pattern})\b", self.help, re.IGNORECASE)
            if match:
                found.append((match.start(), unit))
        if found:
            return min(found)[1]
        return f"in {in_range[0]}" if in_range else ""


Classes = dict[str, tuple[str, list[Setting]]]


def read_dataclasses(package: Path = ROOT / "w2f_torchrl") -> Classes:
    """The dataclasses of all modules: summary and settings by name."""
    classes: Classes = {}
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and _is_dataclass(node):
                docstring = ast.get_docstring(node) or ""
                classes[node.name] = docstring.split("\n\n")[0], list(_settings(node, docstring))
    return classes


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _settings(node: ast.ClassDef, docstring: str) -> Iterator[Setting]:
    listed = _attributes_section(docstring)
    following = [*node.body[1:], None]
    for statement, after in zip(node.body, following, strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name, text = statement.target.id, ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = str(after.value.value)
        default, nested = _default(statement.value, ast.unparse(statement.annotation))
        text = " ".join((text or listed.get(name, "")).split())
        yield Setting(name, ast.unparse(statement.annotation), default, text, nested)


def _attributes_section(docstring: str) -> dict[str, str]:
    _, _, section = docstring.partition("Attributes:\n")
    section = section.partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return dict(entries)


def _default(value: ast.expr | None, annotation: str) -> tuple[str, str | None]:
    """The default as YAML has it, and the dataclass that is nested here."""
    if isinstance(value, ast.Call):
        factory = next(k.value for k in value.keywords if k.arg == "default_factory")
        if isinstance(factory, ast.Lambda):
            value = factory.body
        elif ast.unparse(factory) in ("list", "dict"):
            return {"list": "[]", "dict": "{}"}[ast.unparse(factory)], None
        else:
            return "", ast.unparse(factory)
    if value is None:
        return "", annotation
    return _as_yaml(ast.literal_eval(value)), None


def _as_yaml(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def all_settings(classes: Classes, root: str = "RunConfig", prefix: str = "") -> Iterator[Setting]:
    """Every setting below a dataclass, by its full name: ``environment.image_size`` say."""
    for setting in classes[root][1]:
        name = prefix + setting.name
        if setting.nested:
            yield from all_settings(classes, setting.nested, f"{name}.")
        else:
            yield Setting(name, setting.type, setting.default, setting.help)


def table(settings: list[Setting]) -> str:
    """Settings as a Markdown table."""
    rows = ["| setting | type, unit | default | |", "|---|---|---|---|"]
    for setting in settings:
        kind = setting.type.replace(" | None", " or null").replace("|", "\\|")
        if setting.unit:
            kind += f", {setting.unit}"
        text = setting.help.replace("``", "`").replace("|", "\\|")
        rows.append(f"| `{setting.name}` | {kind} | `{setting.default}` | {text} |")
    return "\n".join(rows)


def options(group: Path) -> str:
    """The options of a Hydra group, with the comment that each file begins with."""
    name = group.relative_to(CONFIGS).as_posix()
    rows = ["| option | |", "|---|---|"]
    for path in sorted(group.glob("*.yaml")):
        lines = path.read_text().splitlines()
        texts = [line[1:].strip() for line in lines if line.startswith("#") and "@" not in line]
        rows.append(f"| `{name}={path.stem}` | {' '.join(texts)} |")
    return "\n".join(rows)


def presets(path: Path = ROOT / "w2f_torchrl" / "modules" / "config.py") -> str:
    """The presets of ``model=``: their sizes, the background's after a stroke."""
    rows = ["| option | belief | hidden, units | classes | CNN depth |", "|---|---|---|---|---|"]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_preset":
            name, *sizes, background = (ast.literal_eval(argument) for argument in node.args)
            cells = [f"{a} / {b}" for a, b in zip(sizes, background, strict=True)]
            rows.append(f"| `model={name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def reference() -> str:
    """The whole reference, as Markdown below the page's own title."""
    classes = read_dataclasses()
    top = [s for s in classes["RunConfig"][1] if s.nested is None]
    parts = ["## The run", table(top)]
    for group in [s for s in classes["RunConfig"][1] if s.nested]:
        assert group.nested is not None
        summary = classes[group.nested][0]
        settings = list(all_settings(classes, group.nested, f"{group.name}."))
        parts += [f"## {group.name}", summary, table(settings)]
        if (CONFIGS / group.name).is_dir():
            parts.append(options(CONFIGS / group.name))
        if group.name == "model":
            parts += ["Foreground / background:", presets()]
    parts += ["## The fields of environment.distraction"]
    parts.append(classes["DistractionConfig"][0])
    parts.append(table(distraction_settings(classes)))
    shown = {group.name for group in classes["RunConfig"][1]}
    for folder in sorted({path.parent for path in CONFIGS.rglob("*.yaml")} - {CONFIGS}):
        if (name := folder.relative_to(CONFIGS).as_posix()) not in shown:
            parts += [f"## {name}", options(folder)]
    return "\n\n".join(parts) + "\n"


def distraction_settings(classes: Classes) -> list[Setting]:
    """The fields that ``environment.distraction={...}`` takes."""
    settings = []
    for part in classes["DistractionConfig"][1]:
        kind = part.type.removesuffix(" | None")
        settings.append(part)
        for field in classes.get(kind, ("", []))[1]:
            name = f"{part.name}.{field.name}"
            settings.append(Setting(name, field.type, field.default, field.help))
    return settings
