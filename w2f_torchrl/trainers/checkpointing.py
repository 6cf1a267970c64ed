"""The former place of :mod:`w2f_torchrl.checkpoint`."""

from w2f_torchrl.checkpoint import *  # noqa: F403
