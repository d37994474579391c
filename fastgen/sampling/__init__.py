"""Exact sampling of causal models: `accelerate` makes a `Sampler`, `check_causality` says where a model leaks."""

from fastgen.sampling.causality.report import CausalityReport, Leak, NotCausalError, check_causality
from fastgen.sampling.sampler import Sampler, accelerate

__all__ = ["CausalityReport", "Leak", "NotCausalError", "Sampler", "accelerate", "check_causality"]
