"""Names for parts of a run that users add: losses, decoders, encoders, segmenters, algorithms.

A file registers a part under a name, and ``plugins=[FILE.py]`` imports the file before the settings
are checked, so that the name can be used on the command line. Environments are registered with
:func:`w2f_torchrl.envs.register_env`. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """The parts of one kind, by name.

    Args:
        setting: The setting that takes the names, for the messages.
        function: Name of the function that registers a part, for the messages.
        builtin: Names that the package provides; :meth:`get` returns None for them.
    """

    def __init__(self, setting: str, function: str, builtin: tuple[str, ...] = ()) -> None:
        self.setting, self.function, self.builtin = setting, function, builtin
        self._parts: dict[str, T] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The package's names, then the registered ones."""
        return (*self.builtin, *self._parts)

    def register(self, name: str, part: T) -> None:
        """Add a part.

        Registering a function or class again under its name, as a notebook does that runs a cell
        twice, replaces it.

        Args:
            name: Its name on the command line.
            part: What builds it.

        Raises:
            TypeError: If the part is not callable.
            ValueError: If the name is empty or taken.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{self.function}: name is {name!r}; it must be a word.")
        if not callable(part):
            raise TypeError(f"{self.function}({name!r}, {part!r}): the second must be callable.")
        before = self._parts.get(name)
        if name in self.names and not (before is not None and _origin(before) == _origin(part)):
            raise ValueError(
                f"{self.function}: name {name!r} is taken ({', '.join(self.names)}): register "
                "yours under another name."
            )
        self._parts[name] = part

    def get(self, name: str | None) -> T | None:
        """Return a registered part; None for the package's names and for None.

        Raises:
            ValueError: Naming the setting, its value and what is allowed.
        """
        if name is not None:
            self.check(name)
        return None if name is None else self._parts.get(name)

    def check(self, name: object) -> None:
        """Check that a name is the package's or registered.

        Raises:
            ValueError: Naming the setting, its value and what is allowed.
        """
        if name not in self.names:
            allowed = ", ".join(self.names or ("null",))
            raise ValueError(
                f"{self.setting}={name!r} is unknown; allowed: {allowed}. To use a name that a "
                f"file registers with {self.function}, pass plugins=[FILE.py]; from Python, import "
                "the file first."
            )


def _origin(part: Any) -> tuple[str, str] | int:
    """Return where a function or class is defined; of other callables their identity."""
    name = getattr(part, "__qualname__", "<lambda>")
    return id(part) if "<" in name else (part.__module__, name)


algorithms: Registry[Callable[..., Any]] = Registry(
    "algo",
    "register_algorithm",
    ("world2filter", "dreamer_v3", "masked_input", "repo", "r2dreamer", "tia"),
)
losses: Registry[Callable[..., Any]] = Registry("algo.loss", "register_loss")
encoders: Registry[Callable[..., Any]] = Registry(
    "model.encoder", "register_encoder", ("convolutional",)
)
decoders: Registry[Callable[..., Any]] = Registry(
    "model.decoder", "register_decoder", ("reference", "torchrl")
)
segmenters: Registry[Callable[..., Any]] = Registry(
    "segmentation", "register_segmenter", ("simulator", "sam3", "student", "median", "auto")
)


def register_algorithm(name: str, build: Callable[..., Any]) -> None:
    """Register an algorithm for ``algo.name``.

    Args:
        name: Its name.
        build: Called with :class:`~w2f_torchrl.algorithms.AlgorithmSettings`; returns an
            :class:`~w2f_torchrl.learner.Algorithm`: the losses, which hold the world model, the
            actor and the critic, and the acting policy.

    Raises:
        TypeError: If ``build`` is not callable.
        ValueError: If the name is empty or taken.
    """
    algorithms.register(name, build)


def register_loss(name: str, loss_class: Callable[..., Any]) -> None:
    """Register losses for ``algo.loss``.

    Args:
        name: Their name.
        loss_class: A subclass of :class:`~w2f_torchrl.objectives.World2FilterLoss`.

    Raises:
        TypeError: If ``loss_class`` is not callable.
        ValueError: If the name is empty or taken.
    """
    losses.register(name, loss_class)


def register_encoder(name: str, build: Callable[..., Any]) -> None:
    """Register an encoder for ``model.encoder``.

    Args:
        name: Its name.
        build: Called with the :class:`~w2f_torchrl.modules.ModelConfig` and the image's side in
            pixels; returns a module from uint8 ``[..., 3, H, W]`` to embeddings ``[..., E]`` with a
            method ``output_features(image_shape)`` that returns E. If it has ``in_keys``, it is
            called with those entries of an observation, ``pixels`` or others that the env has.

    Raises:
        TypeError: If ``build`` is not callable.
        ValueError: If the name is empty or taken.
    """
    encoders.register(name, build)


def register_decoder(name: str, build: Callable[..., Any]) -> None:
    """Register a decoder for ``model.decoder``.

    Args:
        name: Its name.
        build: Called with the :class:`~w2f_torchrl.modules.ModelConfig`, the image's side in pixels
            and the latent (``whole``, ``split``, ``shared`` or ``foreground``); returns a module
            that reads latents of a tensordict and writes its ``out_keys``.

    Raises:
        TypeError: If ``build`` is not callable.
        ValueError: If the name is empty or taken.
    """
    decoders.register(name, build)


def register_segmenter(name: str, make: Callable[..., Any]) -> None:
    """Register a segmenter for ``segmentation.source``.

    Args:
        name: Its name.
        make: Called with the :class:`~w2f_torchrl.config.SegmentationConfig` and the learner's
            device; returns a callable from uint8 ``[N, 3, H, W]`` to bool ``[N, 1, H, W]``.

    Raises:
        TypeError: If ``make`` is not callable.
        ValueError: If the name is empty or taken.
    """
    segmenters.register(name, make)
