"""Traced programs as files: ``.onnx`` for any ONNX runtime, ``.pt2`` for ``torch.export.load``."""

from __future__ import annotations

import importlib.util
import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from w2f_torchrl.utils.files import atomic_path

SUFFIXES = (".onnx", ".pt2")
DESCRIPTION = "w2f_torchrl"
"""Key of an ONNX file's metadata, and name of a ``.pt2`` archive's extra file without its suffix:
JSON that describes the program."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_ONNX_BYTES = 2**31 - 1
"""A file of protocol buffers cannot be larger."""
TOLERANCE = 1e-4
"""Maximum difference of a new ONNX file from torch, on random inputs; only a wrong translation
exceeds it."""
SMALLEST = 9
"""Minimum of a side that is known only at run time, pixels."""
_EXAMPLE = {"N": 2, "H": 36, "W": 60}
_LEAST = {"N": 1, "H": SMALLEST, "W": SMALLEST}


class ExportError(RuntimeError):
    """Something cannot be exported, or a file was not exported by this package."""


class Entry(NamedTuple):
    """An input or output of an exported program.

    Attributes:
        name: Its name.
        dtype: ``uint8``, ``bool`` or ``float32``.
        shape: Sizes; a letter stands for any.
        kind: Of an input: ``observation``, ``carried`` (an output of the previous call, at first
            zeros), ``uniform`` (new draws from U[0, 1)) or ``normal`` (from N(0, 1)). Of an output:
            ``result`` or ``carried``.
        meaning: What it holds.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    kind: str
    meaning: str

    def example(self, sizes: Mapping[str, int], seed: int | None = None) -> Tensor:
        """Return zeros, or random values, of the shape with its letters replaced by ``sizes``."""
        shape = [sizes[size] if isinstance(size, str) else size for size in self.shape]
        dtype = getattr(torch, self.dtype)
        if seed is None:
            return torch.zeros(shape, dtype=dtype)
        uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        scale = {"uint8": 256, "bool": 2, "float32": 1}[self.dtype]
        return (uniform * scale).to(torch.uint8 if self.dtype == "bool" else dtype).to(dtype)


class Program(NamedTuple):
    """What a file holds."""

    step: nn.Module
    """Called with the inputs by name; returns the outputs by name."""
    inputs: Sequence[Entry]
    outputs: Sequence[Entry]
    description: dict[str, Any]
    """Plain values for JSON, in addition to inputs and outputs."""

    def text(self) -> str:
        """Return the whole description as JSON."""
        entries = {
            name: [entry._asdict() for entry in getattr(self, name)]
            for name in ("inputs", "outputs")
        }
        return json.dumps(self.description | entries, allow_nan=False)


def check_format(path: Path) -> None:
    """Refuse a file that could not be written, before anything is loaded.

    Raises:
        ExportError: If the suffix is unknown, or a package of its format is not installed.
    """
    if path.suffix not in SUFFIXES:
        hint = ""
        if path.suffix == ".pt":
            hint = "; `python -m w2f_torchrl.evaluation.export` writes a small checkpoint"
        raise ExportError(
            f"{path} has the suffix {path.suffix!r}; allowed: {', '.join(SUFFIXES)}{hint}."
        )
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise ExportError(
            f"{path} needs {', '.join(missing)}: pip install 'w2f_torchrl[export]'. The other "
            "format, .pt2, needs torch only."
        )


def write_program(program: Program, path: Path) -> Path:
    """Trace a program and write it atomically; the folder is created if missing.

    Raises:
        ExportError: If the format is unknown or not installed; if an operation of the program is
            not torch's, which no other program could run; if the file would be too large; or if the
            ONNX file computes something else.
        OSError: If the file cannot be written.
    """
    check_format(path)
    traced = _trace(program)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".onnx":
            temporary.write_bytes(_onnx_bytes(program, traced))
            _compare(program, temporary)
        else:
            with temporary.open("wb") as stream:
                files = {f"{DESCRIPTION}.json": program.text()}
                torch.export.save(traced, stream, extra_files=files)
    return path


def read_description(path: str | Path) -> dict[str, Any]:
    """Return the description in a file: inputs, outputs, actions, task, settings, versions.

    Args:
        path: An ``.onnx`` or ``.pt2`` file.

    Raises:
        ExportError: If the file is missing, of another format, or was not exported by this package.
    """
    path = Path(path)
    check_format(path)
    text: str | None = None
    try:
        if path.suffix == ".onnx":
            import onnx

            saved = onnx.load(path, load_external_data=False).metadata_props
            text = {entry.key: entry.value for entry in saved}.get(DESCRIPTION)
        else:
            files = {f"{DESCRIPTION}.json": ""}
            with path.open("rb") as stream:
                torch.export.load(stream, extra_files=files)
            text = files[f"{DESCRIPTION}.json"]
        found: dict[str, Any] = json.loads(text or "")
    except Exception as error:  # its type depends on the contents of the file
        first = (str(error).splitlines() or [""])[0][:200]
        raise ExportError(
            f"{path} is not a file of w2f_torchrl.export: {type(error).__name__}: {first}"
        ) from error
    return found


class _Named(nn.Module):
    """A step whose arguments are exactly the inputs, as tracing requires."""

    def __init__(self, step: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.step = step

        def forward(**given: Tensor) -> Any:
            return step(**given)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def _trace(program: Program) -> ExportedProgram:
    """Trace the plain operations: the kernels for CPUs do not apply while torch traces."""
    example = {entry.name: entry.example(_EXAMPLE) for entry in program.inputs}
    letters = {name: Dim(name, min=least) for name, least in _LEAST.items()}
    sizes = {
        entry.name: {
            place: letters[size] for place, size in enumerate(entry.shape) if isinstance(size, str)
        }
        for entry in program.inputs
    }
    named = _Named(program.step, [entry.name for entry in program.inputs])
    with torch.no_grad():
        traced = torch.export.export(named, (), example, dynamic_shapes=sizes, strict=False)
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten":
            raise ExportError(f"{node.target} is not an operation of torch: it cannot be exported.")
    return traced


def _onnx_bytes(program: Program, traced: ExportedProgram) -> bytes:
    example = {entry.name: entry.example(_EXAMPLE) for entry in program.inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        made = torch.onnx.export(
            traced,
            (),
            kwargs=example,
            input_names=[entry.name for entry in program.inputs],
            output_names=[entry.name for entry in program.outputs],
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    model = made.model_proto
    if model.ByteSize() > MAX_ONNX_BYTES:
        raise ExportError(
            f"the program has {model.ByteSize()} bytes; an ONNX file has at most {MAX_ONNX_BYTES}: "
            "write a .pt2 file."
        )
    _describe(model, program)
    return bytes(model.SerializeToString())


def _describe(model: Any, program: Program) -> None:
    """Put the description and the letters of sizes into an ONNX model; remove traces of source."""
    from w2f_torchrl import __version__

    graph = model.graph
    letters: dict[str, str] = {}
    for value, entry in zip(graph.input, program.inputs, strict=True):
        for size, letter in zip(value.type.tensor_type.shape.dim, entry.shape, strict=True):
            if size.dim_param:
                letters[size.dim_param] = str(letter)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in letters:
                size.dim_param = letters[size.dim_param]
    for each in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del each.metadata_props[:]
    model.producer_name, model.producer_version = "w2f_torchrl", __version__
    model.metadata_props.add(key=DESCRIPTION, value=program.text())


def _compare(program: Program, path: Path) -> None:
    """Compare an ONNX file with torch.

    Raises:
        ExportError: If an output differs by more than rounding.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for seed, sizes in enumerate(({"N": 1, "H": 16, "W": 24}, {"N": 3, "H": 84, "W": 20})):
        given = {
            entry.name: entry.example(sizes, 100 * seed + place)
            for place, entry in enumerate(program.inputs)
        }
        got = session.run(None, {name: value.numpy() for name, value in given.items()})
        with torch.no_grad():
            wanted = program.step(**given)
        for entry, value in zip(program.outputs, got, strict=True):
            difference = (wanted[entry.name].float() - torch.from_numpy(value).float()).abs().max()
            if entry.dtype == "float32" and not difference <= TOLERANCE:
                raise ExportError(
                    f"{path.name}: {entry.name} of the ONNX file differs from torch's by "
                    f"{float(difference):.2g}: it was not written."
                )
