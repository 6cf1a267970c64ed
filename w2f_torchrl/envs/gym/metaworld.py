"""Meta-World's environments on the MuJoCo that this package needs.

``environment.task=w2f_torchrl.envs.gym.metaworld:Meta-World/MT1`` imports this module, which
imports Meta-World and mends one of its methods. Meta-World 3.1.1 asks for MuJoCo 3.3.0, where an
equality constraint has eleven numbers; dm_control needs a later one, where it has twelve. Its
method writes all of them, this one the eleven that are meant.
"""

from __future__ import annotations

import mujoco

try:
    from metaworld.sawyer_xyz_env import SawyerMocapBase
except ModuleNotFoundError as error:
    raise ImportError(
        f"{error}: pip install --no-deps metaworld==3.1.1 (without --no-deps it replaces MuJoCo "
        "by a version that dm_control cannot use)."
    ) from error

WELD = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 5.0)
"""Anchor [3], relative position [3] and orientation [4] of the hand, weight of its orientation."""


def reset_mocap_welds(self: SawyerMocapBase) -> None:
    """Weld the hand to the mocap body that actions move, as Meta-World does."""
    if self.model.nmocap > 0:
        welds = self.model.eq_type == mujoco.mjtEq.mjEQ_WELD
        self.model.eq_data[welds, : len(WELD)] = WELD


setattr(SawyerMocapBase, "reset_mocap_welds", reset_mocap_welds)  # noqa: B010  # mypy refuses it
