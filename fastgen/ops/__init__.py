"""The operations: one file each, from the plain PyTorch definition to the public function."""

from fastgen.ops.causal_mask import causal_mask
from fastgen.ops.diagonal_lstm import diagonal_lstm
from fastgen.ops.elbo import elbo
from fastgen.ops.linear_cross_entropy import linear_cross_entropy
from fastgen.ops.masked_conv2d import masked_conv2d
from fastgen.ops.reconstruction_nll import reconstruction_nll
from fastgen.ops.reparameterize_kl import reparameterize_kl
from fastgen.ops.row_lstm import row_lstm

__all__ = [
    "causal_mask",
    "diagonal_lstm",
    "elbo",
    "linear_cross_entropy",
    "masked_conv2d",
    "reconstruction_nll",
    "reparameterize_kl",
    "row_lstm",
]
