"""Which weights of a convolution an autoregressive model may use (van den Oord et al. 2016, section 3.4)."""

import torch
from torch import Tensor


def causal_mask(
    mask_type: str,
    out_channels: int,
    in_channels: int,
    kernel_size: int | tuple[int, int],
    data_channels: int = 1,
) -> Tensor:
    """The mask of a convolution whose output at a pixel sees only pixels before it in raster order.

    A 3x3 kernel, 1 where the input is seen:

        1 1 1
        1 c 0    c = 0 for mask type "A", 1 for "B"
        0 0 0

    With `data_channels` colours the channels of input and output fall into that many equal contiguous groups, in the
    order of the colours (R, G, B). At the centre a group then sees the groups before it ("A"), or those and itself
    ("B"); everywhere else colour does not matter.

    Args:
        mask_type: "A" hides the centre pixel (first layer, on the image), "B" shows it (all later layers).
        out_channels, in_channels: channels of the convolution.
        kernel_size: odd int, or a pair of them, (height, width).
        data_channels: number of colours C of the image.

    Returns:
        BoolTensor (out_channels, in_channels, height, width), True where the weight is used.

    Raises:
        ValueError: an unknown mask type, a kernel_size that is not odd, or channels that do not divide into the groups.
    """
    if mask_type not in ("A", "B"):
        raise ValueError(f"mask_type must be 'A' (centre hidden) or 'B' (centre shown), got {mask_type!r}")
    size = tuple(kernel_size) if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
    if len(size) != 2 or any(type(side) is not int or side < 1 or side % 2 == 0 for side in size):
        raise ValueError(f"kernel_size must be an odd int or a pair of them, got {kernel_size!r}")
    if not isinstance(data_channels, int) or data_channels < 1:
        raise ValueError(f"data_channels must be an int >= 1, got {data_channels!r}")
    for name, channels in (("out_channels", out_channels), ("in_channels", in_channels)):
        if not isinstance(channels, int) or channels < 1 or channels % data_channels:
            raise ValueError(
                f"{name} must be a positive multiple of data_channels = {data_channels}, so that every colour has "
                f"its group of channels; got {channels!r}"
            )
    height, width = size
    row, column = height // 2, width // 2
    mask = torch.zeros(out_channels, in_channels, height, width, dtype=torch.bool)
    mask[:, :, :row] = True
    mask[:, :, row, :column] = True
    group_out = torch.arange(out_channels).unsqueeze(1) // (out_channels // data_channels)
    group_in = torch.arange(in_channels) // (in_channels // data_channels)
    mask[:, :, row, column] = group_in < group_out if mask_type == "A" else group_in <= group_out
    return mask
