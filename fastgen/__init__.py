"""fastgen: Triton kernels and exact, work-optimal sampling for PixelCNN, PixelRNN and VAE models."""

from fastgen._version import __version__
from fastgen.checkpoint import load, save
from fastgen.compression import compress, decompress
from fastgen.distributions import Bernoulli, Categorical, Gaussian, GaussianMixture, Logistic, LogisticMixture
from fastgen.nn.patch import patch
from fastgen.sampling import CausalityReport, NotCausalError, accelerate, check_causality, shift_right

__all__ = [
    "Bernoulli",
    "Categorical",
    "CausalityReport",
    "Gaussian",
    "GaussianMixture",
    "Logistic",
    "LogisticMixture",
    "NotCausalError",
    "__version__",
    "accelerate",
    "check_causality",
    "compress",
    "decompress",
    "load",
    "patch",
    "save",
    "shift_right",
]
