"""The negative log-likelihood of a softmax over levels straight from the features before a 1x1 convolution, without
ever holding the logits of all pixels: they are most of the memory of a PixelCNN with 256 levels."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastgen.ops.reconstruction_nll import INTEGERS, check_levels, reconstruction_nll


def linear_cross_entropy_reference(
    features: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The definition: `reconstruction_nll` of the logits of a 1x1 convolution. Arguments and result as in
    `linear_cross_entropy`; differentiable by autograd, also twice."""
    channels = target.shape[1]
    flat = features.unsqueeze(2).flatten(2).unsqueeze(-1)
    logits = F.conv2d(flat, weight.reshape(*weight.shape[:2], 1, 1), bias)
    return reconstruction_nll(
        logits.unflatten(1, (channels, -1)).transpose(1, 2), target.unsqueeze(2).flatten(2).unsqueeze(-1), "categorical"
    )


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    positions: int = 8192,
) -> Tensor:
    """-log p(target) in nats for logits = conv2d(features, weight, bias) with a 1x1 kernel, summed over each image.

    With more than `positions` pixels the logits are computed in parts, and again in the backward: that takes a third
    more multiplications, but memory for one part only. In float32 and float64
    `torch.nn.functional.linear_cross_entropy` (torch 2.13 and later) does so, one colour after the other; it cannot be
    differentiated twice. Otherwise, and under autocast, checkpointing does.

    Args:
        features: (B, F, H, W), or fewer dimensions after F; any float dtype. Channels last needs no copy.
        weight: (C * K, F), or (C * K, F, 1, 1) of a `torch.nn.Conv2d`: K levels of the first channel, then of the next,
            as the models of `fastgen.models` have them.
        target: integer levels 0..K-1, (B, C, H, W).
        bias: (C * K,).
        positions: pixels of the batch whose logits exist at a time.

    Returns:
        (B,) nats, float32 (float64 for float64).

    Raises:
        TypeError: features, weight or bias is not a float tensor, or target does not hold integers.
        ValueError: shapes do not fit; target values out of range (checked as in `reconstruction_nll`); positions < 1.
    """
    for name, tensor in (("features", features), ("weight", weight), ("bias", bias)):
        if not (tensor is None and name == "bias") and not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a float tensor, got {kind}")
    if not isinstance(target, Tensor) or target.dtype not in INTEGERS:
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must hold integer levels, got {kind}")
    if target.dim() < 2 or features.dim() != target.dim() or features.shape[2:] != target.shape[2:]:
        raise ValueError(
            f"features and target must be (B, F, H, W) and (B, C, H, W), got {tuple(features.shape)} and "
            f"{tuple(target.shape)}"
        )
    if len(features) != len(target):
        raise ValueError(f"features and target must have one batch size, got {len(features)} and {len(target)}")
    batch, channels = target.shape[:2]
    fits = weight.shape[2:].numel() == 1 and weight.dim() in (2, 4) and weight.shape[1] == features.shape[1]
    if not fits or channels == 0 or weight.shape[0] % channels or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have the shape ({channels} * K, {features.shape[1]}) or ({channels} * K, "
            f"{features.shape[1]}, 1, 1), got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have the shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not isinstance(positions, int) or positions < 1:
        raise ValueError(f"positions must be an int >= 1, got {positions!r}")
    levels = weight.shape[0] // channels
    check_levels(target, "categorical", levels)
    pixels = target[:, 0].numel()
    if pixels <= positions:
        return linear_cross_entropy_reference(features, weight, target, bias)
    rows = features.unsqueeze(2).flatten(2).movedim(1, -1).flatten(0, 1)
    level_rows = target.unsqueeze(2).flatten(2).movedim(1, -1).flatten(0, 1)
    weights = weight.flatten(1).split(levels)
    biases = [None] * channels if bias is None else bias.split(levels)
    nats = [
        _of_one_channel(rows, weights[channel], level_rows[:, channel].long(), biases[channel], positions)
        for channel in range(channels)
    ]
    return torch.stack(nats).sum(0).view(batch, -1).sum(1)


def _of_one_channel(rows: Tensor, weight: Tensor, level: Tensor, bias: Tensor | None, positions: int) -> Tensor:
    """Nats (N,) of levels (N,) given features (N, F)."""
    kinds = {tensor.dtype for tensor in (rows, weight, bias) if tensor is not None}
    autocast = torch.is_autocast_enabled(rows.device.type)
    # In half precision torch's would round the nats of each pixel to it.
    if hasattr(F, "linear_cross_entropy") and not autocast and kinds in ({torch.float32}, {torch.float64}):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=positions)
        return F.linear_cross_entropy(rows, weight, level, linear_bias=bias, reduction="none", options=options)
    parts = zip(rows.split(positions), level.split(positions), strict=True)
    return torch.cat([checkpoint(_of_some_rows, *part, weight, bias, use_reentrant=False) for part in parts])


def _of_some_rows(rows: Tensor, level: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As one image of N pixels, in which the kernel takes several to a tile."""
    logits = F.linear(rows, weight, bias).T.unsqueeze(0)
    return reconstruction_nll(logits, level.unsqueeze(0), "categorical", reduction="none").squeeze(0)
