"""Feature maps as kernels write them. Needs no Triton: the operators describe their results by it as well."""

import torch
from torch import Tensor


def empty_map(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, channels, height, width) with the batch, device and dtype of `like`, channels-last, uninitialized.

    No view: PyTorch forbids users to write into views that an operator returns.
    """
    size = (like.shape[0], channels, height, width)
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)
