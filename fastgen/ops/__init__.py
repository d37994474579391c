"""The operations: one file each, from the plain PyTorch definition to the public function."""

from fastgen.ops.diagonal_lstm import diagonal_lstm
from fastgen.ops.elbo import elbo
from fastgen.ops.reconstruction_nll import reconstruction_nll
from fastgen.ops.reparameterize_kl import reparameterize_kl
from fastgen.ops.row_lstm import row_lstm

__all__ = ["diagonal_lstm", "elbo", "reconstruction_nll", "reparameterize_kl", "row_lstm"]
