"""The operations: one file each, from the plain PyTorch definition to the public function."""

from fastgen.ops.elbo import elbo
from fastgen.ops.reconstruction_nll import reconstruction_nll

__all__ = ["elbo", "reconstruction_nll"]
