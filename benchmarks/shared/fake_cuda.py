"""CUDA tensors on a machine without a GPU: operations are recorded, no numbers are computed.

Torch's fake tensors have shape, dtype and device and no memory. Under :func:`fake_cuda` whole
updates run on them as on a GPU, autocast and backward pass included, and :class:`Watch` notes every
operation: those that mix devices, those by which the host would read the device, and, for
``benchmarks/speed/kernels.py``, how many kernels there are.

What it can't see: numbers, the order of streams, whether a capture would go through.
"""

from __future__ import annotations

import ctypes
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations whose result the host must know before it can go on: their shape depends on values.
HOST_READS = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "_unique2",
        "allclose",
        "bincount",
        "equal",
        "histc",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    )
)
#: Operations that copy between devices because they are told to; an index on the host is copied.
COPIES = frozenset(("aten::_to_copy", "aten::copy_", "aten::index"))
#: What these modules' code does is named by file and line; what others do by who called them.
OWN = ("w2f_torchrl/", "torchrl/", "tensordict/")


def why_not() -> str | None:
    """Why :func:`fake_cuda` can't be used here, or None where it can."""
    if torch.cuda.is_available():
        return "a machine with a CUDA device: fake tensors would meet the real one"
    try:
        _context_slot()
    except (OSError, RuntimeError) as error:
        return f"torch {torch.__version__}: {error}"
    return None


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Make every new tensor fake, and torch believe in ``device="cuda"``.

    Tensors from outside are refused, so models and samples must be made within.
    """
    with ExitStack() as stack:
        for name, answer in (
            ("torch.cuda.current_device", 0),
            ("torch.cuda.is_bf16_supported", True),
            # Autocast switches itself off, with no more than a warning, where there is no device.
            ("torch.cuda.amp.common.amp_definitely_not_available", False),
            # Draws again until no value lies outside.
            ("torch.nn.init.trunc_normal_", None),
            ("torch.cuda.set_rng_state", None),
            ("torch.cuda.is_current_stream_capturing", False),
        ):
            stack.enter_context(mock.patch(name, lambda *_, answer=answer, **__: answer))
        for name, stand_in in (
            ("torch.nn.Module._apply", _apply),
            ("torch.cuda.get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
        ):
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(_backward_without_a_driver())
        # Autograd has a thread for each device; a fake one's would look for the device.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy's
        yield stack.enter_context(_Mode(allow_non_fake_inputs=False))


class _Mode(FakeTensorMode):
    """A mode that deep copies of its tensors, the slow critic's, belong to as well."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mode:
        return self


class Watch(TorchDispatchMode):
    """Notes the operations that run within it, below autograd and autocast.

    Args:
        reads_are_allowed: The host may read the device, and copy from it and to it, as a film or
            an evaluation does. A number that it reads is 1: nothing is known about it.
        device: The type of the device that is watched.
        note: Called with each operation on the device, its arguments and its result.
    """

    def __init__(
        self,
        *,
        reads_are_allowed: bool = False,
        device: str = "cuda",
        note: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        """Operations that a GPU, or the capture of a graph, would not accept, with their lines."""
        self.operations: Counter[str] = Counter()
        """How often each operation ran on the device."""
        self._reads_are_allowed, self._device, self._note = reads_are_allowed, device, note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and look at the devices of what it takes and gives."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # torch asks for a tensor's device
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.device.type == "cuda" for x in tensors)
        name = func._schema.name
        if on_device and not self._reads_are_allowed and _is_read(name, args):
            self.found[f"read by the host: {func} at {_where()}"] += 1
        if name == "aten::_local_scalar_dense" and isinstance(tensors[0], FakeTensor):
            return {torch.bool: True}.get(tensors[0].dtype, 1)
        out = func(*args, **kwargs)
        tensors += [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        if {"cpu", "cuda"} <= devices and not (self._reads_are_allowed and name in COPIES):
            host = [f"{x.dtype} {tuple(x.shape)}" for x in tensors if x.device.type == "cpu"]
            self.found[f"mixed devices: {func} with {host} on the host at {_where()}"] += 1
        if self._device in devices:
            self.operations[str(func)] += 1
            if self._note is not None:
                self._note(func, args, out)
        return out


def fake_like(sample: TensorDictBase, device: str = "cuda") -> TensorDictBase:
    """A fake tensordict of the same keys, shapes and dtypes; call it under :func:`fake_cuda`."""
    return sample.apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), device=device)


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What ``Module.to`` calls: torch's own can't move fake parameters.

    Real parameters stay the same objects when they move to another device, these don't; buffers are
    others after it in both.
    """
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = fn(parameter)
            if moved is not parameter:
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _is_read(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the host must know values, or by a mask how many entries there are, to continue."""
    if name not in ("aten::index", "aten::index_put_"):
        return name in HOST_READS
    indices = [x for x in args[1] if isinstance(x, Tensor)]
    return any(x.dtype in (torch.bool, torch.uint8) for x in indices)


def _where() -> str:
    """The innermost frames of the package and of TorchRL, innermost first."""
    found = []
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename.split("site-packages/")[-1]
        own = "w2f_torchrl/" in path
        if own or path.startswith(OWN):
            found.append(f"{path[path.rfind('w2f_torchrl/') if own else 0 :]}:{frame.lineno}")
            if own:
                break
    return " < ".join(found[:4]) or "autograd"


@contextmanager
def _backward_without_a_driver() -> Iterator[None]:
    """Let autograd's engine learn that no device has a context; it asks, and would raise.

    It asks a C++ object that a build or machine without CUDA has too. Its table of virtual
    functions is replaced by a copy in which one is Python's.
    """
    slot, size = _context_slot()
    get_hooks = ctypes.CDLL(str(_torch() / "lib" / "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.cast(get_hooks(), ctypes.POINTER(ctypes.c_void_p))
    word, before = ctypes.sizeof(ctypes.c_void_p), 2  # the offset to the top, and the type's name
    original = hooks[0]
    table = (ctypes.c_void_p * (before + size))()
    ctypes.memmove(table, original - before * word, ctypes.sizeof(table))
    no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda *_: False)
    table[before + slot] = ctypes.cast(no, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(table) + before * word
    try:
        yield
    finally:
        hooks[0] = original


def _context_slot() -> tuple[int, int]:
    """Where ``hasPrimaryContext`` is in the table of the hooks' functions, and the table's length.

    Read off the headers that torch brings, in the order of their declarations, as the Itanium ABI
    lays tables out; a destructor takes two places.

    Raises:
        RuntimeError: If the headers are others than expected.
        OSError: If they are missing.
    """
    functions = []
    for name in ("AcceleratorHooksInterface", "CUDAHooksInterface"):
        text = (_torch() / "include" / "ATen" / "detail" / f"{name}.h").read_text()
        text = re.sub(r"//[^\n]*", "", text)
        # Overriding functions keep the base's place.
        declared = re.findall(r"virtual\s+[^;{]*?(~?\w+)\s*\([^;{]*[;{]", text)
        functions += declared
    if functions[:1] != ["~AcceleratorHooksInterface"] or "hasPrimaryContext" not in functions:
        raise RuntimeError(f"autograd's hooks are laid out otherwise: {functions[:4]}")
    library = _torch() / "lib" / "libtorch_cpu.so"
    if not library.exists():
        raise RuntimeError(f"{library.name} does not exist")
    return functions.index("hasPrimaryContext") + 1, len(functions) + 1


def _torch() -> Path:
    return Path(torch.__file__).parent
