"""A camera that wanders around its target, as in the Distracting Control Suite.

It follows Stone et al., "The Distracting Control Suite -- A Challenging Benchmark for Reinforcement
Learning from Pixels" (2021), and the code published with it: a position in spherical coordinates
within a box around the start, a Gaussian walk of the velocity, and a camera that keeps looking at
its first target.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import mujoco
import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs.simulation import Camera, FreeCamera, Simulation

FloatArray = npt.NDArray[np.float64]
Vector = tuple[float, float, float]

_RADIUS_OF_UNIT_SPEED = 4.0
"""Start radius, metres, for which the paper gives speeds; they scale with the radius."""
_OVERHEAD = 0.1
"""Radians; a camera that starts closer to the vertical is not kept upright."""
_AGENT = 1
"""The first body after the world."""
_FRONT = -math.pi / 2
"""Azimuth of a camera that looks along the y axis, as most of the suite's do."""


class CameraBox(NamedTuple):
    """The limits of a camera's walk.

    Attributes:
        low: Minimum radius (metres), azimuth and polar angle (radians, from the vertical).
        high: Maximum of the same.
        roll: Maximum roll to either side, radians.
        speed: Start radius over 4 m; all velocities are multiplied by it.
        upright: Whether the image's horizon is level before the roll; False for a camera that
            starts overhead, whose azimuth is meaningless.
    """

    low: Vector
    high: Vector
    roll: float
    speed: float
    upright: bool


def camera_box(start: Vector, scale: float) -> CameraBox:
    """Return the limits around a start position.

    Args:
        start: The camera's position from the centre of the walk, metres.
        scale: Intensity s in [0, 1]: angles and roll reach pi/2 s to each side, the radius 0.5 s of
            itself inwards and 1.5 s outwards.

    Returns:
        The box. A camera that does not start overhead stays above the horizon and on the side on
        which it starts.
    """
    radius, azimuth, polar = to_sphere(start)
    reach = math.pi / 2 * scale
    azimuths = (azimuth - reach, azimuth + reach)
    polars = (polar - reach, polar + reach)
    upright = polar > _OVERHEAD
    if upright:
        centre = _FRONT if abs(azimuth - _FRONT) < math.pi / 4 else azimuth
        azimuths = _within(azimuths, centre - math.pi / 2, centre + math.pi / 2)
        polars = _within(polars, 0.0, math.pi / 2)
    return CameraBox(
        low=(radius * (1 - 0.5 * scale), azimuths[0], polars[0]),
        high=(radius * (1 + 1.5 * scale), azimuths[1], polars[1]),
        roll=reach,
        speed=radius / _RADIUS_OF_UNIT_SPEED,
        upright=upright,
    )


class CameraWalk:
    """The position and roll of one wandering camera.

    Args:
        scale: Intensity s. In units of the box's ``speed``, the velocity's noise has standard
            deviation 0.1 s and its norm is at most 0.4 s, metres per step; the roll's are pi/300 s
            and pi/50 s, radians per step.
        dynamic: Whether the camera moves after its start.
    """

    def __init__(self, scale: float, *, dynamic: bool = True) -> None:
        self.scale = scale
        self.dynamic = dynamic
        self.box = CameraBox((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0, 0.0, upright=True)
        self.sphere: Vector = (0.0, 0.0, 0.0)
        """Radius, azimuth and polar angle."""
        self.velocity: Vector = (0.0, 0.0, 0.0)
        self.roll = 0.0
        self.roll_velocity = 0.0

    def start(self, box: CameraBox, generator: np.random.Generator) -> None:
        """Start at a random place in the box, in a random direction."""
        self.box = box
        radius, azimuth, polar = generator.uniform(box.low, box.high).tolist()
        self.sphere = (radius, azimuth, polar)
        self.roll = generator.uniform(-box.roll, box.roll)
        direction = generator.standard_normal(3)
        speed = generator.uniform(0.0, 0.4 * self.scale) / math.sqrt(float(direction @ direction))
        x, y, z = (direction * speed).tolist()
        self.velocity = (x, y, z)
        fastest = math.pi / 50 * self.scale
        self.roll_velocity = generator.uniform(-fastest, fastest)

    def step(self, generator: np.random.Generator) -> None:
        """Move once, if the walk is dynamic."""
        if not self.dynamic:
            return
        *noise, roll_noise = generator.standard_normal(4).tolist()
        self._move(noise)
        fastest = math.pi / 50 * self.scale
        velocity = self.roll_velocity + math.pi / 300 * self.scale * roll_noise
        roll = self.roll + _clip(velocity, -fastest, fastest)
        roll = _clip(roll, -self.box.roll, self.box.roll)
        self.roll, self.roll_velocity = roll, roll - self.roll

    def _move(self, noise: list[float]) -> None:
        box = self.box
        deviation, fastest = 0.1 * self.scale * box.speed, 0.4 * self.scale * box.speed
        velocity = [v + deviation * n for v, n in zip(self.velocity, noise, strict=True)]
        norm = math.hypot(*velocity)
        shrink = fastest / norm if norm > fastest else 1.0
        x, y, z = self.position
        move = [shrink * v for v in velocity]
        radius, azimuth, polar = to_sphere((x + move[0], y + move[1], z + move[2]))
        # The azimuth jumps by a full turn when the walk crosses the negative x axis.
        middle = (box.low[1] + box.high[1]) / 2
        azimuth = middle + math.remainder(azimuth - middle, 2 * math.pi)
        self.sphere = (
            _clip(radius, box.low[0], box.high[0]),
            _clip(azimuth, box.low[1], box.high[1]),
            _clip(polar, box.low[2], box.high[2]),
        )
        after = self.position
        # The velocity becomes the actual move, so that the walk slides along the box's wall.
        self.velocity = (after[0] - x, after[1] - y, after[2] - z)

    @property
    def position(self) -> Vector:
        """Position from the centre of the walk, metres."""
        return to_cartesian(self.sphere)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, except the generator."""
        return {
            "box": self.box._asdict(),
            "sphere": self.sphere,
            "velocity": self.velocity,
            "roll": self.roll,
            "roll_velocity": self.roll_velocity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self.box = CameraBox(**state["box"])
        self.sphere = state["sphere"]
        self.velocity = state["velocity"]
        self.roll = state["roll"]
        self.roll_velocity = state["roll_velocity"]


class CameraPose:
    """Place and aim a camera while the simulation's centre of mass moves.

    Args:
        simulation: The simulation.
        camera: A free camera, or one of the model that is fixed in the world or tracks a centre of
            mass.

    Raises:
        ValueError: If the model's camera does neither.
    """

    def __init__(self, simulation: Simulation, camera: Camera) -> None:
        self._simulation, self._camera = simulation, camera
        self._look_at: FloatArray = np.zeros(3)
        self._saved: tuple[FloatArray, FloatArray] | None = None
        self._tracks = False
        if isinstance(camera, FreeCamera):
            return
        model = simulation.model
        mode, self._body = int(model.cam_mode[camera]), int(model.cam_bodyid[camera])
        self._tracks = mode == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM
        fixed = mode == mujoco.mjtCamLight.mjCAMLIGHT_FIXED and model.body_weldid[self._body] == 0
        if not (self._tracks or fixed):
            raise ValueError(
                f"camera_id is {camera}: the camera distraction moves cameras that are fixed in "
                "the world or track a centre of mass, and this one does neither."
            )

    def start(self) -> Vector:
        """Store the camera's target, and return the camera's position from the walk's centre.

        The target lies in the viewing direction, as far away as the agent's centre of mass. A free
        camera's target is the point that it looks at, which is also the walk's centre.
        """
        data, camera = self._simulation.data, self._camera
        if isinstance(camera, FreeCamera):
            self._look_at = np.zeros(3)
            x, y, z = (camera.position - camera.lookat).tolist()
            return x, y, z
        position = data.cam_xpos[camera]
        agent = data.subtree_com[_AGENT]
        forward = -data.cam_xmat[camera].reshape(3, 3)[:, 2]
        self._look_at = position + float(np.linalg.norm(position - agent)) * forward
        self._look_at = self._look_at - self._centre()
        x, y, z = (position - self._centre()).tolist()
        return x, y, z

    def _centre(self) -> FloatArray:
        """The walk's centre: the world's origin, the centre of mass, or a free camera's target."""
        if isinstance(self._camera, FreeCamera):
            return self._camera.lookat
        if not self._tracks:
            return np.zeros(3)
        return np.array(self._simulation.data.subtree_com[self._body])

    def apply(self, walk: CameraWalk) -> None:
        """Move the camera to the position of the walk, until :meth:`restore`."""
        position = walk.position
        look_at = self._look_at.tolist()
        direction = (look_at[0] - position[0], look_at[1] - position[1], look_at[2] - position[2])
        roll = walk.roll + (math.pi if walk.box.upright and self._upside_down() else 0.0)
        frame = look_along(direction, roll, upright=walk.box.upright)
        place = self._centre() + position
        if isinstance(self._camera, FreeCamera):
            self._camera.moved = place, np.array(frame)
            return
        data, camera = self._simulation.data, self._camera
        self._saved = data.cam_xpos[camera].copy(), data.cam_xmat[camera].copy()
        data.cam_xpos[camera], data.cam_xmat[camera] = place, frame

    def _upside_down(self) -> bool:
        """Whether the camera's picture is upside down, as Meta-World's are; it stays so."""
        camera = self._camera
        if isinstance(camera, FreeCamera):
            return False
        return bool(self._simulation.data.cam_xmat[camera][7] < 0.0)  # z of its up vector

    def restore(self) -> None:
        """Move the camera back."""
        if isinstance(self._camera, FreeCamera):
            self._camera.moved = None
        elif self._saved is not None:
            data, camera = self._simulation.data, self._camera
            data.cam_xpos[camera], data.cam_xmat[camera] = self._saved
            self._saved = None

    def state_dict(self) -> dict[str, Any]:
        """The camera's target, relative to the walk's centre."""
        return {"look_at": self._look_at.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self._look_at = np.asarray(state["look_at"], dtype=np.float64)


def look_along(direction: Vector, roll: float, *, upright: bool) -> list[float]:
    """Return a camera's orientation, row by row [9]; its columns point right, up and backwards.

    Args:
        direction: Viewing direction, of any length.
        roll: Rotation about the viewing direction, radians.
        upright: Whether the horizon is level at zero roll. Otherwise the camera is rotated from
            looking straight down by the shortest rotation.
    """
    norm = math.hypot(*direction)
    x, y, z = direction[0] / norm, direction[1] / norm, direction[2] / norm
    if upright:
        level = math.hypot(x, y)
        east, north = (x / level, y / level) if level > 0.0 else (0.0, 1.0)
        right = (north, -east, 0.0)
        up = (-east * z, -north * z, level)
    else:
        # Rodrigues' formula for the rotation that takes (0, 0, -1) to the direction.
        share = 1.0 / (1.0 - z) if z < 1.0 else 0.0
        right = (1.0 - x * x * share, -x * y * share, x)
        up = (-x * y * share, 1.0 - y * y * share, y)
    cosine, sine = math.cos(roll), math.sin(roll)
    frame = []
    for r, u, forward in zip(right, up, (x, y, z), strict=True):
        frame += [cosine * r + sine * u, cosine * u - sine * r, -forward]
    return frame


def to_sphere(position: Vector) -> Vector:
    """Return radius, azimuth in (-pi, pi] and polar angle in [0, pi] of a position."""
    x, y, z = position
    level = math.hypot(x, y)
    return math.hypot(level, z), math.atan2(y, x), math.atan2(level, z)


def to_cartesian(sphere: Vector) -> Vector:
    """Return the position of a radius, an azimuth and a polar angle, which may be negative."""
    radius, azimuth, polar = sphere
    level = radius * math.sin(polar)
    return level * math.cos(azimuth), level * math.sin(azimuth), radius * math.cos(polar)


def _within(limits: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    return _clip(limits[0], low, high), _clip(limits[1], low, high)


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
