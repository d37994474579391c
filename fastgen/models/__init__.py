"""Generative models of images: exact likelihoods, exact samples."""

from fastgen.models.gated_pixelcnn import GatedPixelCNN
from fastgen.models.pixelcnn import PixelCNN
from fastgen.models.pixelcnnpp import PixelCNNPP

__all__ = ["GatedPixelCNN", "PixelCNN", "PixelCNNPP"]
