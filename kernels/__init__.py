"""Triton kernels and their launchers. Imported as `fastgen.kernels`; knows tensors, nothing of fastgen."""
