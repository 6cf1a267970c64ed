"""Faster forms of what the networks compute.

:mod:`w2f_torchrl.modules` says what the networks are and can be read without this package. A kernel
takes what its plain form takes and gives the same, up to rounding.
"""
