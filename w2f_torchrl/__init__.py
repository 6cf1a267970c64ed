"""World2Filter on TorchRL: DreamerV3 from pixels whose latent holds the agent, not the scenery.

Importing this package is cheap: names are looked up where they are first used, so a configuration
can be checked before torch is imported. It sees to the order of imports all the same: whoever
imports dm_control or MuJoCo afterwards gets torch, triton and TorchRL imported first. With Mesa's
software rendering the other order ends in a segmentation fault: Mesa and triton each bring an LLVM,
and triton's can't be loaded second. Where that is about to happen the import raises.
"""

from __future__ import annotations

from w2f_torchrl._import_order import install_guard
from w2f_torchrl._moved import find_moved_modules

__version__ = "0.1.0"

install_guard()
find_moved_modules()
