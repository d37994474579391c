"""Kernels of variational autoencoders."""
