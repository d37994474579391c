"""What the recorder knows of single operators: which only move elements, which are written out as simpler ones."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.overrides import TorchFunctionMode

from fastgen.ops.masked_conv2d import in_aten
from fastgen.sampling.graph import Unsupported

aten = torch.ops.aten

# Written out as pointwise operations and reductions, which have rules.
DECOMPOSED = get_decompositions(
    [
        aten.native_batch_norm,
        aten._native_batch_norm_legit,
        aten._native_batch_norm_legit_no_training,
        aten.native_group_norm,
        aten.glu,
        aten.addcmul,
        aten.addcdiv,
        aten.std,
        aten.var_mean,
        aten.std_mean,
        aten._prelu_kernel,
        aten.hardswish,
        aten.hardsigmoid,
        aten.log_sigmoid_forward,
        aten.rms_norm,
        aten.aminmax,
    ]
)
DECOMPOSED[torch.ops.fastgen.masked_conv2d.default] = in_aten  # what runs on a GPU

# Results that depend on shapes alone.
SHAPE_ONLY = {
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like", "ones_like", "full_like",
    "empty_like",
}  # fmt: skip

METADATA_ONLY = {
    "transpose_", "t_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "detach_", "as_strided_"
}  # fmt: skip

# Movement of elements, done by the same operator on element numbers; zeros get number 0.
MOVEMENT = {
    "roll", "flip", "repeat", "index_select", "im2col", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "take_along_dim", "gather", "index", "tril", "triu", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact2d", "replication_pad1d", "replication_pad2d", "reflection_pad1d",
    "reflection_pad2d", "slice_scatter", "select_scatter", "diagonal_scatter", "diag_embed", "take",
    "repeat_interleave", "constant_pad_nd", "unfold_copy", "index_put", "rot90", "split_with_sizes_copy",
}  # fmt: skip


SCANS = {"diagonal_lstm", "row_lstm"}  # of fastgen

# Read in one piece: where no map describes such an operand, it becomes a value of its own.
WHOLE = {
    "convolution", "mm", "addmm", "bmm", "baddbmm", "mv", "dot", "addmv", "_softmax", "_log_softmax", "_safe_softmax",
    "native_layer_norm", "embedding", "sum", "mean", "amax", "amin", "max", "min", "var", "linalg_vector_norm",
    "logsumexp", "prod", "cumsum", "argmax", "any", "all", "norm", "diagonal_lstm", "row_lstm", "index",
    "max_pool2d_with_indices",
}  # fmt: skip


class Rewrites(TorchFunctionMode):
    """Functions whose own code reads values, or that cannot tell a batch of one image from a dimension of size 1."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.one_hot:
            classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
            if classes > 0:
                return (args[0].unsqueeze(-1) == torch.arange(classes, device=args[0].device)).long()
        if func in (torch.squeeze, torch.Tensor.squeeze) and len(args) == 1 and not kwargs and args[0].dim() > 0:
            x = args[0]
            return x.reshape(x.shape[:1] + tuple(size for size in x.shape[1:] if size != 1))
        return func(*args, **kwargs)


def average(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling as a convolution of each channel by itself."""
    kernel, padding = (list(one) * (2 if len(one) == 1 else 1) for one in (kernel, padding))
    if ceil_mode or (any(padding) and not count_include_pad):
        raise Unsupported("average pooling whose windows count their elements")
    channels = x.shape[-3]
    share = 1 / (divisor_override or math.prod(kernel))
    weight = torch.full((channels, 1, *kernel), share, dtype=x.dtype, device=x.device)
    found = torch.convolution(
        x.reshape(-1, *x.shape[-3:]),
        weight.to(x.device),
        None,
        stride or kernel,
        padding,
        [1, 1],
        False,
        [0, 0],
        channels,
    )
    return found.reshape(*x.shape[:-3], *found.shape[1:])
