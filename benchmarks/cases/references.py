"""The rivals, in plain PyTorch: what a careful user would write today."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.nn import DiagonalLSTM, GatedMaskedBlock, MaskedConv2d, RowLSTM


def compiled(call: Callable, mode: str | None = None) -> Callable:
    """The function under `torch.compile`, with static shapes. Nothing is compiled, and no GPU initialized, before the
    first call."""
    made = functools.cache(lambda: torch.compile(call, dynamic=False, mode=mode))

    def step(*args: Any, **options: Any) -> Any:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # the result of the previous call may be overwritten
        return made()(*args, **options)

    return step


def rivals_of(eager: Callable) -> dict[str, Callable]:
    """The function itself, compiled, and compiled with CUDA graphs."""
    return {
        "eager": eager,
        "compiled": compiled(eager),
        "compiled reduce-overhead": compiled(eager, "reduce-overhead"),
    }


# Reparameterization and KL


def reparameterize_kl_textbook(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Kingma & Welling 2014, appendix B, as in most code; half precision is computed in float32."""
    mu32, logvar32 = mu.float(), logvar.float()
    noise = torch.randn_like(mu) if eps is None else eps
    z = mu32 + torch.exp(0.5 * logvar32) * noise
    kl = -0.5 * (1 + logvar32 - mu32.square() - logvar32.exp()).flatten(1).sum(1)
    return z.to(mu.dtype), kl


def reparameterize_kl_distributions(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same with torch.distributions, without its argument checks, which wait for the GPU."""
    normal = torch.distributions.Normal
    mu32 = mu.float()
    posterior = normal(mu32, torch.exp(0.5 * logvar.float()), validate_args=False)
    prior = normal(torch.zeros_like(mu32), torch.ones_like(mu32), validate_args=False)
    z = posterior.rsample() if eps is None else posterior.loc + posterior.scale * eps
    return z.to(mu.dtype), torch.distributions.kl_divergence(posterior, prior).flatten(1).sum(1)


# Likelihoods: (B,) nats from the decoder's parameters


def bernoulli_nll(params: Tensor, target: Tensor) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(params.float(), target.float(), reduction="none")
    return losses.flatten(1).sum(1)


def gaussian_nll(params: Tensor, target: Tensor) -> Tensor:
    mean, logvar = params.float().chunk(2, 1)
    losses = 0.5 * ((target - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))
    return losses.flatten(1).sum(1)


def categorical_nll(params: Tensor, target: Tensor) -> Tensor:
    """F.cross_entropy with the levels on dim 1, a layout in which it copies nothing."""
    return F.cross_entropy(params.float(), target.long(), reduction="none").flatten(1).sum(1)


def logistic_mixture_nll(params: Tensor, target: Tensor) -> Tensor:
    """PixelCNN++'s likelihood of RGB images (Salimans et al. 2017), with the exact difference of two sigmoids.

    The published implementation, which switches between approximations by thresholds, is not faster, and in float32 is
    wrong by up to 1.6 nats per pixel.
    """
    n_mix = params.shape[1] // 10
    params = params.float()
    logits = params[:, :n_mix].log_softmax(1)
    means, log_scales, coefficients = params[:, n_mix:].unflatten(1, (3, 3, n_mix)).unbind(2)
    coefficients = coefficients.tanh()
    x = (target.float() / 127.5 - 1).unsqueeze(2)
    green = means[:, 1] + coefficients[:, 0] * x[:, 0]
    blue = means[:, 2] + coefficients[:, 1] * x[:, 0] + coefficients[:, 2] * x[:, 1]
    means = torch.stack((means[:, 0], green, blue), 1)
    inverse = torch.exp(-log_scales.clamp(min=-7))
    upper = F.logsigmoid((x - means + 1 / 255) * inverse)
    lower = F.logsigmoid(-(x - means - 1 / 255) * inverse)
    inside = upper + lower + torch.log(-torch.expm1(-inverse * 2 / 255))
    level = target.unsqueeze(2)
    per_colour = torch.where(level == 0, upper, torch.where(level == 255, lower, inside))
    return -(logits + per_colour.sum(1)).logsumexp(1).flatten(1).sum(1)


def bernoulli_nll_distributions(params: Tensor, target: Tensor) -> Tensor:
    """With torch.distributions, without its argument checks, which wait for the GPU."""
    distribution = torch.distributions.Bernoulli(logits=params.float(), validate_args=False)
    return -distribution.log_prob(target.float()).flatten(1).sum(1)


def gaussian_nll_distributions(params: Tensor, target: Tensor) -> Tensor:
    mean, logvar = params.float().chunk(2, 1)
    distribution = torch.distributions.Normal(mean, torch.exp(0.5 * logvar), validate_args=False)
    return -distribution.log_prob(target).flatten(1).sum(1)


def gaussian_nll_torch(params: Tensor, target: Tensor) -> Tensor:
    """torch's own loss, which takes variances. It waits for the GPU, to check that no variance is negative."""
    mean, logvar = params.float().chunk(2, 1)
    losses = F.gaussian_nll_loss(mean, target, torch.exp(logvar), full=True, eps=0.0, reduction="none")
    return losses.flatten(1).sum(1)


def categorical_nll_distributions(params: Tensor, target: Tensor) -> Tensor:
    distribution = torch.distributions.Categorical(logits=params.float().movedim(1, -1), validate_args=False)
    return -distribution.log_prob(target.long()).flatten(1).sum(1)


def convolution_cross_entropy(features: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    """Logits (B, levels, 3, H, W) by a 1x1 convolution, then F.cross_entropy."""
    logits = F.conv2d(features, weight[:, :, None, None], bias).unflatten(1, (3, -1)).transpose(1, 2)
    return categorical_nll(logits, target)


def linear_cross_entropy_torch(
    features: Tensor, weight: Tensor, target: Tensor, bias: Tensor, *, chunked: bool = False
) -> Tensor:
    """torch's own F.linear_cross_entropy, a matrix product and a softmax in one function. By default it keeps the
    logits. The chunked variant does not; it takes the three colours one after the other, and returns only the sum over
    all images."""
    rows = features.movedim(1, -1).flatten(0, -2)
    levels = target.movedim(1, -1).flatten(0, -2)
    weights, biases = weight.unflatten(0, (3, -1)), bias.unflatten(0, (3, -1))
    if chunked:
        options = nn.LinearCrossEntropyOptions(allow_retain_graph=True)
        nats_of_colours = (
            F.linear_cross_entropy(rows, w, level, linear_bias=b, reduction="sum", options=options)
            for w, b, level in zip(weights, biases, levels.unbind(1), strict=True)
        )
        return sum(nats_of_colours, rows.new_zeros(()))
    by_level = weights.transpose(0, 1), biases.transpose(0, 1)
    nats = F.linear_cross_entropy(rows, by_level[0], levels, linear_bias=by_level[1], reduction="none")
    return nats.view(len(features), -1).sum(1)


# Scans


def _cell(pre: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    o, f, i, g = pre.chunk(4, 1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def diagonal_lstm_skewed(gates: Tensor, weight: Tensor) -> Tensor:
    """van den Oord et al. 2016, section 3.2, as in published code. The map is skewed: every row is shifted by one
    against the row above, so that diagonals become columns. Then each column takes a convolution with a kernel of 2."""
    batch, _, height, width = gates.shape
    units = weight.shape[1]
    skewed = torch.stack([F.pad(gates[:, :, i], (i, height - 1 - i)) for i in range(height)], 2)
    hidden = gates.new_zeros(batch, units, height)
    cell = torch.zeros_like(hidden, dtype=torch.float32)
    columns = []
    for j in range(width + height - 1):
        pre = skewed[..., j].float() + F.conv1d(F.pad(hidden, (1, 0)), weight).float()
        rows = torch.arange(height, device=gates.device)
        inside = (j - rows >= 0) & (j - rows < width)
        hidden, cell = _cell(pre, cell)
        hidden, cell = (hidden * inside).to(gates.dtype), cell * inside
        columns.append(hidden)
    out = torch.stack(columns, -1)
    return torch.stack([out[:, :, i, i : i + width] for i in range(height)], 2)


def row_lstm_convolutions(gates: Tensor, weight: Tensor) -> Tensor:
    """van den Oord et al. 2016, section 3.1: for every row, a one-dimensional convolution over the row above."""
    hidden = gates.new_zeros(gates.shape[0], weight.shape[1], gates.shape[3])
    cell = torch.zeros_like(hidden, dtype=torch.float32)
    rows = []
    for i in range(gates.shape[2]):
        pre = gates[:, :, i].float() + F.conv1d(hidden, weight, padding=weight.shape[2] // 2).float()
        hidden, cell = _cell(pre, cell)
        hidden = hidden.to(gates.dtype)
        rows.append(hidden)
    return torch.stack(rows, 2)


def lstm_of_equal_length(steps: int, units: int, device: torch.device, dtype: torch.dtype) -> Callable:
    """torch.nn.LSTM (cuDNN on a GPU) with as many steps, rows and units: a landmark, since it is another recurrence.

    It takes no state from the neighbour above. Its input-to-state product, which the diagonal LSTM does not have, is
    kept small by a single input feature.
    """
    lstm = functools.cache(lambda: torch.nn.LSTM(1, units, bias=False).to(device, dtype))

    def landmark(gates: Tensor, weight: Tensor) -> Tensor:
        rows = gates.shape[0] * gates.shape[2]
        return lstm()(gates.new_zeros(steps, rows, 1) + 0 * gates.flatten()[0])[0]

    return landmark


# Masked convolutions


def _activate(out: Tensor, activation: str) -> Tensor:
    if activation == "gated":
        signal, valve = out.chunk(2, 1)
        return signal.tanh() * valve.sigmoid()
    return out.relu() if activation == "relu" else out


def masked_conv2d_dense(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """A dense convolution whose masked weights are zero, as in nearly all PixelCNN code; "same" padding."""
    return _activate(F.conv2d(x, weight * mask, bias, padding=weight.shape[2] // 2), activation)


def masked_conv2d_cropped(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """A convolution with the upper rows of the kernel, which hold all live weights: about half the work of the dense
    one, without copies of x."""
    reach = weight.shape[2] // 2
    upper = (weight * mask)[:, :, : reach + 1]
    return _activate(F.conv2d(x, upper, bias, padding=reach)[:, :, : x.shape[2]], activation)


def masked_conv2d_split(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """Two convolutions without masked taps: one with the rows of the kernel above the centre (1x3 of a 3x3), one with
    the centre and the taps to its left (1x2). Their results are added, which writes the output twice."""
    reach = weight.shape[2] // 2
    live = weight * mask
    out = F.conv2d(x, live[:, :, reach : reach + 1, : reach + 1], bias, padding=(0, reach))[..., : x.shape[3]]
    if reach:
        out = out + F.conv2d(x, live[:, :, :reach], padding=reach)[:, :, : x.shape[2]]
    return _activate(out, activation)


def gated_block_cropped(block: GatedMaskedBlock, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
    """A layer of the Gated PixelCNN of mask type B with the block's parameters. The stacks are a 2x3 and a 1x2
    convolution without masked taps, padded and cropped."""
    reach = block.vertical.kernel_size[0] // 2
    above = F.conv2d(vertical, block.vertical.weight[:, :, : reach + 1], block.vertical.bias, padding=reach)
    above = above[:, :, : vertical.shape[2]]
    beside = F.conv2d(horizontal, block.horizontal.weight[..., : reach + 1], padding=(0, reach))
    beside = beside[..., : horizontal.shape[3]]
    features = _activate(beside + block.across(above), "gated")
    out = F.conv2d(features, block.output.weight, block.output.bias)
    return _activate(above, "gated"), out + horizontal


class PlainMaskedConv2d(nn.Module):
    """Replaces a MaskedConv2d in `plain`: a dense convolution with the same parameters."""

    mask: Tensor

    def __init__(self, layer: MaskedConv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("mask", layer.mask.to(layer.weight.dtype))
        self.geometry: Any = (layer.stride, layer.padding, layer.dilation)
        self.activation = layer.activation

    def forward(self, x: Tensor, condition: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        out = F.conv2d(x, self.weight * self.mask, self.bias, *self.geometry)
        out = _activate(out if condition is None else out + condition[:, :, None, None], self.activation)
        return out if residual is None else out + residual


class PlainScan(nn.Module):
    """Replaces a DiagonalLSTM or a RowLSTM in `plain`: a loop with the same parameters."""

    def __init__(self, layer: DiagonalLSTM | RowLSTM) -> None:
        super().__init__()
        self.input_to_state = PlainMaskedConv2d(layer.input_to_state)
        self.state_to_state = layer.state_to_state
        self.by_rows = isinstance(layer, RowLSTM)
        self.reverse = isinstance(layer, DiagonalLSTM) and layer.reverse

    def forward(self, x: Tensor) -> Tensor:
        gates = self.input_to_state(x)
        if self.by_rows:
            return row_lstm_convolutions(gates, self.state_to_state)
        if self.reverse:
            return diagonal_lstm_skewed(gates.flip(3), self.state_to_state).flip(3)
        return diagonal_lstm_skewed(gates, self.state_to_state)


def plain(model: nn.Module) -> nn.Module:
    """A copy of a model in plain PyTorch that shares its Parameter objects."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    copied = copy.deepcopy(model, shared)
    for parent in list(copied.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, MaskedConv2d):
                setattr(parent, name, PlainMaskedConv2d(layer))
            elif isinstance(layer, (DiagonalLSTM, RowLSTM)):
                setattr(parent, name, PlainScan(layer))
    return copied
