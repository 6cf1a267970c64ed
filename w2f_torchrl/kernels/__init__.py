"""Faster forms of the operations of the networks.

:mod:`w2f_torchrl.modules` defines the networks, and can be read without this package. A kernel has
the arguments and, up to rounding, the results of its plain form; only modules import kernels, never
the reverse. If a kernel does not apply, it calls its plain form itself, so modules need not know
the device. :func:`~w2f_torchrl.kernels.switch.use_cpu_kernels` switches all kernels for CPUs.

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
``imagination``     the unprepared networks           always; casts once under    test_kernels,
                                                      autocast                    test_fast_modules
``side_stream``     the work on the current stream    ``cuda_graph_parallel``     benchmarks/
                                                                                  gpu_acceptance.py
==================  ================================  ==========================  =================

Tests are in ``tests/``. ``test_cpu_kernels`` compares a whole update with the switch on and off;
``test_kernels`` bounds the number of GPU kernels.

To add a kernel: write the plain form in a module first. Write the kernel with the same signature
here, make it call the plain form unless ``switch.use_cpu_kernels(x)``, compare values and gradients
in float64, and time both with ``benchmarks/learner.py``.
"""
