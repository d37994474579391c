"""Generative models of images: autoregressive models with exact likelihoods and samples, a VAE and an autoencoder."""

from fastgen.models.autoencoder import Autoencoder
from fastgen.models.gated_pixelcnn import GatedPixelCNN
from fastgen.models.pixelcnn import PixelCNN
from fastgen.models.pixelcnnpp import PixelCNNPP
from fastgen.models.pixelrnn import PixelRNN
from fastgen.models.vae import VAE

__all__ = ["VAE", "Autoencoder", "GatedPixelCNN", "PixelCNN", "PixelCNNPP", "PixelRNN"]
