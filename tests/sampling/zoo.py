"""Small causal models of every kind, by name."""

from tests.sampling import zoo_convolutions, zoo_gated, zoo_modern, zoo_public, zoo_sequences
from tests.sampling.zoo_case import CASES, built

__all__ = ["CASES", "built", "zoo_convolutions", "zoo_gated", "zoo_modern", "zoo_public", "zoo_sequences"]
