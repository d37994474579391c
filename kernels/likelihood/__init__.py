"""Negative log-likelihood of images under the decoder's distribution: forward and backward."""
