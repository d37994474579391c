"""The layers of PixelRNN (van den Oord et al. 2016, sections 3.1 and 3.2)."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.nn.masked_conv import MaskedConv2d, parameter
from fastgen.ops import causal_mask, diagonal_lstm, row_lstm

CLOSED = -1e4  # a gate that is exactly 0 after its sigmoid, in every float type


@functools.cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which the scans from the right run: one for all layers of a device, which share its memory pool."""
    return torch.cuda.Stream(device)


class _ScanLSTM(nn.Module):
    """Base class: the masked input-to-state convolution and the state-to-state weights. The forget gate's bias starts
    at 1."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: tuple[int, int],
        state_taps: int,
        mask_type: str,
        data_channels: int,
    ) -> None:
        super().__init__()
        if not isinstance(hidden_channels, int) or hidden_channels < 1 or hidden_channels % data_channels:
            raise ValueError(
                f"hidden_channels must be a positive multiple of data_channels = {data_channels}, so that every colour "
                f"has its group of units; got {hidden_channels!r}"
            )
        # Each gate has its own colour groups. States come from other pixels, of which all colours may be seen.
        mask = causal_mask(mask_type, hidden_channels, in_channels, kernel_size, data_channels).repeat(4, 1, 1, 1)
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        self.input_to_state = MaskedConv2d(in_channels, 4 * hidden_channels, kernel_size, padding=padding, mask=mask)
        self.state_to_state = nn.Parameter(torch.empty(4 * hidden_channels, hidden_channels, state_taps))
        bound = (state_taps * hidden_channels) ** -0.5
        nn.init.uniform_(self.state_to_state, -bound, bound)
        with torch.no_grad():
            self.bias[hidden_channels : 2 * hidden_channels] = 1

    def _gates_and_weight(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gates for x, and the state-to-state weights."""
        convolution: Any = self._modules["input_to_state"]  # as an attribute it takes the host longer
        return convolution(x), parameter(self, "state_to_state")

    @property
    def bias(self) -> Tensor:
        """The bias of the gates, (4h,), which is that of the convolution."""
        bias = self.input_to_state.bias
        assert bias is not None
        return bias


class DiagonalLSTM(_ScanLSTM):
    """An LSTM that sweeps the image diagonal by diagonal (van den Oord et al. 2016, section 3.2): a pixel sees its
    quadrant, what is above and to the left of it. (B, in_channels, H, W) -> (B, hidden_channels, H, W).

    The input-to-state convolution is the paper's 1x1 for mask type "B". For "A", where a 1x1 convolution would see
    nothing, it is 3x3. State-to-state weights (4h, h, 2) are those of `fastgen.ops.diagonal_lstm`, one tap for the
    pixel above, one for the pixel to the left, and the convolution's bias is the only one.

    Args:
        in_channels: channels of the input.
        hidden_channels: units h, the channels of the output.
        mask_type: "A" hides the pixel itself (a first layer, on the image), "B" shows it.
        data_channels: number of colours, see `fastgen.ops.causal_mask`; in_channels and hidden_channels are multiples.
        reverse: scan from the right: a pixel then sees what is above and to the right of it, which is not causal.
            `DiagonalBiLSTM` shifts the result down by a row, which makes it so.
        skewed_padding: states as in implementations that skew a zero-padded image (row i shifted right by i): there
            the LSTM runs through the padding as well, where its input is the bias, so that the state to the left of
            column 0 is not 0 but that of i steps on the bias alone. Loads their checkpoints, the biases of their two
            convolutions added; costs H - 1 more columns.

    Raises:
        ValueError: channels that are no multiples of data_channels, an unknown mask type.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        mask_type: str,
        data_channels: int = 1,
        reverse: bool = False,
        skewed_padding: bool = False,
    ) -> None:
        kernel = (3, 3) if mask_type == "A" else (1, 1)
        super().__init__(in_channels, hidden_channels, kernel, 2, mask_type, data_channels)
        self.reverse = reverse
        self.skewed_padding = skewed_padding

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, hidden_channels, H, W)."""
        gates, weight = self._gates_and_weight(x)
        if not self.skewed_padding:
            return diagonal_lstm(gates, weight, reverse=self.reverse)
        padding = self._padding(gates)
        width = gates.shape[3]
        if self.reverse:
            gates = torch.cat((gates, padding.flip(3)), 3)
            return diagonal_lstm(gates, weight, reverse=True)[..., :width]
        return diagonal_lstm(torch.cat((padding, gates), 3), weight)[..., padding.shape[3] :]

    def _padding(self, gates: Tensor) -> Tensor:
        """Gates (B, 4h, H, H - 1) to the left of the image. The last i columns of row i are the bias. The columns
        before them have a closed input gate, so that the state is 0 where the bias begins."""
        height = gates.shape[2]
        bias = self.bias.to(gates.dtype)
        output, forget, _, content = bias.chunk(4)
        closed = torch.cat((output, forget, torch.full_like(output, CLOSED), content))
        place = torch.arange(height, device=gates.device)
        biased = place[:, None] + place[: height - 1] >= height - 1
        padding = torch.where(biased, bias[:, None, None], closed[:, None, None])
        return padding.expand(gates.shape[0], -1, -1, -1)


class DiagonalBiLSTM(nn.Module):
    """The Diagonal BiLSTM (van den Oord et al. 2016, section 3.2): one scan from the left, one from the right; together
    a pixel sees all pixels before it. (B, in_channels, H, W) -> (B, hidden_channels, H, W).

    The scan from the right sees the rest of a pixel's own row. Its states are therefore shifted down by one row before
    they are added to the others (section 3.2): what is added to a pixel comes from the rows above it. For the same
    reason its input needs no mask, neither of the centre nor of colours. Units of both scans have their own weights.

    Args:
        in_channels, hidden_channels, mask_type, data_channels, skewed_padding: as in `DiagonalLSTM`.

    Raises:
        ValueError: as in `DiagonalLSTM`.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        mask_type: str,
        data_channels: int = 1,
        skewed_padding: bool = False,
    ) -> None:
        super().__init__()
        self.from_left = DiagonalLSTM(
            in_channels,
            hidden_channels,
            mask_type=mask_type,
            data_channels=data_channels,
            skewed_padding=skewed_padding,
        )
        self.from_right = DiagonalLSTM(
            in_channels, hidden_channels, mask_type="B", reverse=True, skewed_padding=skewed_padding
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, hidden_channels, H, W)."""
        if x.is_cuda and not torch.compiler.is_compiling():
            # A scan takes few processors for long: both run at the same time, in eager mode and in a CUDA graph.
            here, beside = torch.cuda.current_stream(x.device), second_stream(x.device)
            beside.wait_stream(here)
            with torch.cuda.stream(beside):
                from_right = self.from_right(x)
            from_left = self.from_left(x)
            here.wait_stream(beside)
            # Each tensor is used on another stream than the one it was allocated on: its memory must live until then.
            x.record_stream(beside)
            from_right.record_stream(here)
        else:
            from_left, from_right = self.from_left(x), self.from_right(x)
        return from_left + F.pad(from_right[:, :, :-1], (0, 0, 1, 0))


class RowLSTM(_ScanLSTM):
    """The Row LSTM (van den Oord et al. 2016, section 3.1): all pixels of a row at once from the row above; a pixel
    sees a triangle above it. (B, in_channels, H, W) -> (B, hidden_channels, H, W).

    The input-to-state convolution is the paper's 1x3, masked, for mask type "B", and 3x3 for "A". State-to-state
    weights (4h, h, kernel_size) are those of `fastgen.ops.row_lstm`.

    Args:
        in_channels, hidden_channels, mask_type, data_channels: as in `DiagonalLSTM`.
        kernel_size: odd, states of the row above that a pixel sees.

    Raises:
        ValueError: as in `DiagonalLSTM`, and for a kernel_size that is not odd.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        mask_type: str,
        data_channels: int = 1,
        kernel_size: int = 3,
    ) -> None:
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd int >= 1, got {kernel_size!r}")
        kernel = (3, 3) if mask_type == "A" else (1, 3)
        super().__init__(in_channels, hidden_channels, kernel, kernel_size, mask_type, data_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, hidden_channels, H, W)."""
        return row_lstm(*self._gates_and_weight(x))
