"""Modules over the operations, with the signatures of their `torch.nn` counterparts."""

from fastgen.nn.gated import GatedMaskedBlock
from fastgen.nn.masked_conv import MaskedConv2d

__all__ = ["GatedMaskedBlock", "MaskedConv2d"]
