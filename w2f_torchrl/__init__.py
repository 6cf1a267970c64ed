"""World2Filter on TorchRL: DreamerV3 from pixels whose latent holds the agent, not the scenery.

Importing this package is cheap: names are imported when they are first used, so that a
configuration can be checked before torch is imported. It also ensures the order of imports: if
dm_control or MuJoCo is imported later, torch, triton and TorchRL are imported first. With Mesa's
software rendering the opposite order ends in a segmentation fault: Mesa and triton each bring an
LLVM, and triton's cannot be loaded second. If that is about to happen, the import raises.
"""

from __future__ import annotations

from w2f_torchrl._import_order import install_guard
from w2f_torchrl._moved import find_moved_modules

__version__ = "0.1.0"

install_guard()
find_moved_modules()
