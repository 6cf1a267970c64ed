"""Faster forms of the operations that the networks are made of.

:mod:`w2f_torchrl.modules` says what the networks are, and can be read without this package. A
kernel takes what its plain form takes and returns the same, up to rounding; imports run from
modules to kernels only. Where a kernel does not apply, it calls its plain form itself, so no module
asks what it runs on. :func:`~w2f_torchrl.kernels.switch.use_cpu_kernels` is the switch of all that
are written for CPUs.

For each module its plain form, when it is used, and the test in ``tests/`` that guards it:

- ``products``: ``F.linear`` and ``torch.bmm``. On a CPU with AVX-512, in float32, from 2^20
  multiplications; in a compiled graph only without a gradient. ``test_fast_modules``.
- ``dense``: TorchRL's ``DreamerV3MLP``. On a CPU, eager, without autocast. ``test_fast_modules``.
- ``convolution``: ``F.conv2d``, ``F.max_pool2d``, ``F.conv_transpose2d``, norm and SiLU. On a CPU,
  eager, without autocast; subpixels also on a GPU. ``test_decoders``, ``test_fast_modules``.
- ``block_gru``: TorchRL's cell, ``prior.rnn``. Always; on a CPU imagination computes tanh by the
  logistic function. ``test_modules``, ``test_imagination``.
- ``scan``, ``scan_step``, ``scan_types``: ``modules.rssm.roll``. With one dynamics and one
  posterior layer, as in all presets; its layout differs on a GPU. ``test_modules``,
  ``test_fast_modules``, ``test_kernels``.
- ``categoricals`` (draws): ``modules.sample_one_hot``. In imagination, and in ``scan``, which adds
  the straight-through gradient. ``test_fast_modules``.
- ``categoricals`` (two-hot): TorchRL's ``SymExpTwoHot``. Always. ``test_fast_modules``.
- ``imagination``: the networks themselves. Always; under autocast their weights are cast once.
  ``test_kernels``, ``test_fast_modules``.
- ``side_stream``: a call of the work in place. With ``training.execution=cuda_graph_parallel``.
  ``test_fake_cuda``.

``test_cpu_kernels`` compares a whole update with the switch on and off; ``test_kernels`` bounds the
number of GPU kernels.

To add a kernel: write the plain form in a module first. Write the kernel with the same signature
here, let it call the plain form unless ``switch.use_cpu_kernels(x)``, compare values and gradients
in float64, and time both with ``benchmarks/speed/learner.py``.
"""
