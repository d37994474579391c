"""Bounds of parameters, which definitions and kernels share. Needs no Triton."""

MIN_LOG_SCALE = -7.0  # PixelCNN++ bounds the log-scales from below here
# Finite parameters must give finite likelihoods and gradients: what exceeds these saturates (no gradient beyond).
LOGIT_LIMIT = 1e30
DEVIATION_LIMIT = 1e15
