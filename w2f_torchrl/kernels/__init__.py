"""Faster forms of the operations that the networks are made of.

:mod:`w2f_torchrl.modules` says what the networks are, and can be read without this package. A
kernel takes what its plain form takes and returns the same, up to rounding; imports run from
modules to kernels only. Where a kernel does not apply, it calls its plain form itself, so no module
asks what it runs on. :func:`~w2f_torchrl.kernels.switch.use_cpu_kernels` is the switch of all that
are written for CPUs.

==================  ================================  ==========================  =================
module              plain form                        used                        guarded by
==================  ================================  ==========================  =================
``products``        ``F.linear``, ``torch.bmm``       CPU with AVX-512, float32,  test_fast_modules
                                                      from 2^20 multiplications;
                                                      compiled without gradient
``dense``           TorchRL's ``DreamerV3MLP``        CPU, eager, no autocast     test_fast_modules
``convolution``     ``F.conv2d``, ``F.max_pool2d``,   CPU, eager, no autocast;    test_decoders,
                    ``F.conv_transpose2d``, norm and  subpixels also on a GPU     test_fast_modules
                    SiLU
``block_gru``       TorchRL's cell, ``prior.rnn``     always; its logistic        test_modules,
                                                      function for tanh on a CPU  test_imagination
``scan``,           ``modules.rssm.roll``             one dynamics and one        test_modules,
``scan_step``,                                        posterior layer (all        test_fast_modules,
``scan_types``                                        presets); two layouts       test_kernels
``one_hot``         ``modules.sample_one_hot``        without a gradient; in      test_fast_modules
                                                      ``scan`` straight-through
``two_hot``         TorchRL's ``SymExpTwoHot``        always                      test_fast_modules
``imagination``     the networks as they are          always; casts once under    test_kernels,
                                                      autocast                    test_fast_modules
``side_stream``     the work called where it stands   ``cuda_graph_parallel``     benchmarks/
                                                                                  gpu_acceptance.py
==================  ================================  ==========================  =================

Tests are in ``tests/``. ``test_cpu_kernels`` compares a whole update with the switch on and off;
``test_kernels`` bounds the number of GPU kernels.

To add a kernel: write the plain form in a module first. Write the kernel with the same signature
here, let it call the plain form unless ``switch.use_cpu_kernels(x)``, compare values and gradients
in float64, and time both with ``benchmarks/learner.py``.
"""
