"""Exact sampling of causal models: `accelerate` makes a `Sampler`."""

from fastgen.sampling.sampler import Sampler, accelerate

__all__ = ["Sampler", "accelerate"]
