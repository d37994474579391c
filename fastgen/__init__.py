"""fastgen: Triton kernels and exact, work-optimal sampling for PixelCNN, PixelRNN and VAE models."""

from fastgen._version import __version__
from fastgen.distributions import Bernoulli, Categorical, LogisticMixture

__all__ = ["Bernoulli", "Categorical", "LogisticMixture", "__version__"]
