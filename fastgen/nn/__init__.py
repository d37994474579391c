"""Modules built on the operations of `fastgen.ops`. MaskedConv2d has the signature and the state_dict of nn.Conv2d."""

from fastgen.nn.gated import GatedMaskedBlock
from fastgen.nn.lstm import DiagonalBiLSTM, DiagonalLSTM, RowLSTM
from fastgen.nn.masked_conv import MaskedConv2d

__all__ = ["DiagonalBiLSTM", "DiagonalLSTM", "GatedMaskedBlock", "MaskedConv2d", "RowLSTM"]
