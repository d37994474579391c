"""What differs from batch to batch at fixed places, where CUDA graphs read it."""

from dataclasses import replace

import torch

from fastgen.sampling.request import SampleRequest


class FixedRequest:
    """Noise and known levels of the batch that is drawn.

    Args:
        request: the first one; all have noise of the same shape.
    """

    def __init__(self, request: SampleRequest) -> None:
        known = torch.zeros((request.n, *request.shape), dtype=request.dtype, device=request.noise.device)
        self.noise = torch.empty_like(request.noise, memory_format=torch.contiguous_format)
        self.known, self.known_mask = known, known.bool()

    def take(self, request: SampleRequest) -> SampleRequest:
        """The request with its noise and known levels copied to the fixed places."""
        self.noise.copy_(request.noise)
        fixed = replace(request, noise=self.noise, progress=None)
        if request.known is None or request.known_mask is None:
            return fixed
        self.known.copy_(request.known)
        self.known_mask.copy_(request.known_mask)
        return replace(fixed, known=self.known, known_mask=self.known_mask)
