"""Exact sampling of causal models: `accelerate` makes a `Sampler`, `check_causality` says where a model leaks."""

from fastgen.sampling.causality.drawing_order import check_causality
from fastgen.sampling.causality.report import CausalityReport, Leak, NotCausalError
from fastgen.sampling.sampler import Sampler, accelerate
from fastgen.sampling.shift import shift_right

__all__ = ["CausalityReport", "Leak", "NotCausalError", "Sampler", "accelerate", "check_causality", "shift_right"]
