"""Modules over the operations, with the signatures of their `torch.nn` counterparts."""

from fastgen.nn.gated import GatedMaskedBlock
from fastgen.nn.lstm import DiagonalBiLSTM, DiagonalLSTM, RowLSTM
from fastgen.nn.masked_conv import MaskedConv2d

__all__ = ["DiagonalBiLSTM", "DiagonalLSTM", "GatedMaskedBlock", "MaskedConv2d", "RowLSTM"]
