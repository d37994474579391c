"""A convolution that sees only what an autoregressive model may see, as a drop-in for `torch.nn.Conv2d`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.kernels.maps import common_padding
from fastgen.ops import causal_mask, masked_conv2d
from fastgen.ops._implementation import uses_triton
from fastgen.ops._masked_conv2d_arguments import ACTIVATIONS


def parameter(module: nn.Module, name: str) -> Any:
    """module.name, which takes the host longer. Where something computes it, as weight normalization does, it is no
    parameter, but an attribute."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


class MaskedConv2d(nn.Conv2d):
    """`activation(conv2d(x, weight * mask, bias))`, with the mask of `fastgen.ops.causal_mask` (van den Oord et al.
    2016, "Pixel Recurrent Neural Networks", section 3.4): (B, in_channels, H, W) -> (B, out_channels, H', W') in any
    float dtype, H' and W' as of `nn.Conv2d`.

    Parameters have the names, shapes and initial values of `nn.Conv2d`. The mask is a buffer that state_dict does not
    hold; a checkpoint that has a "mask" key loads too, if its mask is the same. On the CPU the kernel is cropped to the
    smallest box that holds all live weights (the upper two of three rows, say), which is exact.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as in `nn.Conv2d`.
        mask_type: "A" hides the centre pixel, "B" shows it.
        data_channels: number of colours; see `causal_mask`.
        activation: "none", "relu", or "gated", which leaves out_channels / 2 channels; each half of the channels then
            has its own colour groups.
        mask: any BoolTensor (out_channels, in_channels, kh, kw) instead; mask_type is not given then.

    Raises:
        ValueError: an argument that `causal_mask` or `masked_conv2d` does not take; both or none of mask_type and mask;
            an odd out_channels with "gated".
        RuntimeError: a layer made with `mask` leaves the meta device, where its values are lost.
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        mask_type: str | None = None,
        data_channels: int = 1,
        activation: str = "none",
        mask: Tensor | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
        if activation == "gated" and out_channels % 2:
            raise ValueError(f"activation='gated' halves the channels: out_channels must be even, got {out_channels!r}")
        if (mask_type is None) == (mask is None):
            raise ValueError(f"give mask_type ('A' or 'B') or mask, one of them; got mask_type={mask_type!r}")
        if mask_type is not None:
            mask = gate_mask(mask_type, out_channels, in_channels, kernel_size, data_channels, activation)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias, device=device, dtype=dtype
        )
        self.mask_type = mask_type
        self.data_channels = data_channels
        self.activation = activation
        self._set_mask(mask)

    def _set_mask(self, mask: Any) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != self.weight.shape:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a bool tensor of the shape {tuple(self.weight.shape)}, got {got}")
        self.register_buffer("mask", mask.to(self.weight.device), persistent=False)
        self._box, self._box_of = live_box(mask), state_of(self.mask)

    def _apply(self, fn, recurse=True):
        lost = self._has_own_mask() and self.mask.is_meta
        super()._apply(fn, recurse)
        if lost:
            self._restore_mask()
        return self

    def _has_own_mask(self) -> bool:
        return "mask" in self._non_persistent_buffers_set

    def _restore_mask(self) -> None:
        """Makes the mask anew if the weight has left the meta device: neither a checkpoint nor `to_empty` has it."""
        if self.weight.is_meta:
            return
        if self.mask_type is None:
            raise RuntimeError("the values of mask are lost on the meta device: make a layer with mask= elsewhere")
        sizes = self.out_channels, self.in_channels, self.kernel_size
        with torch.device(self.weight.device):
            self._set_mask(gate_mask(self.mask_type, *sizes, self.data_channels, self.activation))

    def live_mask(self) -> Tensor:
        """The mask that is applied, a BoolTensor of the weight's shape. `patch` overrides it."""
        return self._buffers["mask"]  # type: ignore[return-value]

    @property
    def geometry(self) -> Any:
        """Stride, padding and dilation, a pair each. Valid only if the padding is the same on both sides."""
        before_w, _, before_h, _ = self._reversed_padding_repeated_twice
        return self.stride, (before_h, before_w), self.dilation

    def forward(self, x: Tensor, condition: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W); condition and residual as in `fastgen.ops.masked_conv2d`."""
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        live = self.live_mask()
        before_w, after_w, before_h, after_h = self._reversed_padding_repeated_twice
        if before_w == after_w and before_h == after_h and uses_triton("auto", x):
            return masked_conv2d(
                x, weight, live, bias, stride=self.stride, padding=(before_h, before_w), dilation=self.dilation,
                activation=self.activation, condition=condition, residual=residual,
            )  # fmt: skip
        mask: Tensor | None = live
        height, width = weight.shape[2:]
        top, bottom, left, right = 0, height, 0, width
        if not uses_triton("auto", x):
            if not torch.compiler.is_compiling() and self._box_of != state_of(live):
                self._box, self._box_of = live_box(live), state_of(live)
            if self._box is not None:
                top, bottom, left, right, full = self._box
                if (bottom - top, right - left) != (height, width):
                    weight = weight[:, :, top:bottom, left:right]
                    mask = None if full else live[:, :, top:bottom, left:right]
                elif full:
                    mask = None
        # The cropped rows and columns of the kernel need no padding, or no input, any more.
        around_h = before_h - top * self.dilation[0], after_h - (height - bottom) * self.dilation[0]
        around_w = before_w - left * self.dilation[1], after_w - (width - right) * self.dilation[1]
        padding, pads = common_padding((around_h, around_w))
        return masked_conv2d(
            F.pad(x, pads) if any(pads) else x, weight, mask, bias, stride=self.stride, padding=padding,
            dilation=self.dilation, activation=self.activation, condition=condition, residual=residual,
        )  # fmt: skip

    def provider(self, x: Tensor) -> str:
        """Which implementation computes the output and each gradient for an input like x (B, in_channels, H, W), and
        why, one line each. A kernel that was not yet tried on x's device is tried."""
        if not uses_triton("auto", x):
            return f"PyTorch's definition: the kernels run on CUDA tensors, x is on {x.device}"
        from fastgen.kernels.masked_conv2d import launch

        return launch.explain(x, self.weight, self.live_mask(), self.geometry, self.activation)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        key = prefix + "mask"
        stored = state_dict.pop(key, None) if self._has_own_mask() else None
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if self._has_own_mask() and self.mask.is_meta:
            self._restore_mask()
        if stored is not None and not self.mask.is_meta:
            stored, shape = stored.to(self.mask.device) != 0, self.mask.shape
            fits = stored.dim() == 4 and all(side in (1, ours) for side, ours in zip(stored.shape, shape, strict=True))
            if not fits or not torch.equal(stored.expand(shape), self.mask):
                errors.append(f"{key} is not the mask of this layer: {self}")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask_type={self.mask_type!r}, activation={self.activation!r}"


def gate_mask(mask_type: str, out: int, into: int, kernel: Any, data_channels: int, activation: str) -> Tensor:
    """The causal mask of a layer. With "gated" each half of the channels has its own colour groups."""
    halves = 2 if activation == "gated" else 1
    return causal_mask(mask_type, out // halves, into, kernel, data_channels).repeat(halves, 1, 1, 1)


def live_box(mask: Tensor) -> tuple[int, int, int, int, bool] | None:
    """(top, bottom, left, right) of the smallest box of taps with all live weights, and whether all in it are live.

    None where there is no live weight, or the mask has no values to read (on the meta device, under `torch.func`).
    """
    try:
        taps = mask.any(0).any(0).nonzero().tolist()
        if not taps:
            return None
        rows, columns = zip(*taps, strict=True)
        top, bottom, left, right = min(rows), max(rows) + 1, min(columns), max(columns) + 1
        return top, bottom, left, right, bool(mask[:, :, top:bottom, left:right].all())
    except RuntimeError:
        return None


def state_of(mask: Tensor) -> tuple[int, int]:
    """A pair that changes when the mask is replaced by another tensor or written to."""
    return id(mask), 0 if mask.is_inference() else mask._version
