"""fastgen: Triton kernels and exact, work-optimal sampling for PixelCNN, PixelRNN and VAE models."""

from fastgen._version import __version__
from fastgen.checkpoint import load, save
from fastgen.distributions import Bernoulli, Categorical, LogisticMixture
from fastgen.nn.patch import patch
from fastgen.sampling import accelerate

__all__ = ["Bernoulli", "Categorical", "LogisticMixture", "__version__", "accelerate", "load", "patch", "save"]
