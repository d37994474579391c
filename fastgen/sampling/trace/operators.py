"""What the recorder knows of single operators: which only move elements, which are written out as simpler ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastgen.ops.masked_conv2d import in_aten
from fastgen.sampling.rules.slicewise import ALONG
from fastgen.sampling.trace.graph import Unsupported

aten = torch.ops.aten

# Written out as pointwise operations and reductions, which have rules.
DECOMPOSED = get_decompositions(
    [
        aten.native_batch_norm,
        aten._native_batch_norm_legit,
        aten._native_batch_norm_legit_no_training,
        aten.glu,
        aten.addcmul,
        aten.addcdiv,
        aten._prelu_kernel,
        aten.hardswish,
        aten.hardsigmoid,
        aten.log_sigmoid_forward,
        aten.rms_norm,
        aten.aminmax,
        aten.mv,
        aten.addmv,
        aten.dot,
        aten.vdot,
        aten.hardtanh,
        aten.mish,
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
    "masked_scatter", "index_copy", "index_fill", "scatter",
}  # fmt: skip
# Which of their arguments hold elements, where it is not the first alone; a number stands for a constant.
SOURCES = {
    "slice_scatter": (0, 1), "select_scatter": (0, 1), "diagonal_scatter": (0, 1), "index_put": (0, 2),
    "masked_scatter": (0, 2), "index_copy": (0, 3), "index_fill": (0, 3), "scatter": (0, 3),
    "constant_pad_nd": (0, 2),
}  # fmt: skip


# The same elements in other memory.
SAME_ELEMENTS = {"clone", "_to_copy", "contiguous", "lift_fresh_copy", "copy", "alias_copy", "view_copy"}

SCANS = {"diagonal_lstm", "row_lstm"}  # of fastgen

# Read in one piece: where no map describes such an operand, it becomes a value of its own.
WHOLE = {
    "convolution", "mm", "addmm", "bmm", "baddbmm", "_softmax", "_log_softmax", "_safe_softmax",
    "native_layer_norm", "embedding", "sum", "mean", "amax", "amin", "max", "min", "var", "linalg_vector_norm",
    "logsumexp", "prod", "cumsum", "argmax", "any", "all", "norm", "diagonal_lstm", "row_lstm", "index",
    "cumprod", "logcumsumexp", "cummax", "cummin", "view_as_real_copy",
} | ALONG  # fmt: skip


READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


class Rewrites(TorchFunctionMode):
    """Functions whose own code reads values, or chooses an implementation of attention inside of the model."""

    def __init__(self, tracked: Callable[[Any], bool]) -> None:
        super().__init__()
        self.tracked = tracked

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS and self.tracked(args[0]):
            raise Unsupported(f"{func.__name__}() takes what depends on the input out of PyTorch")
        if func is torch.nn.functional.one_hot:
            classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
            if classes > 0:
                return (args[0].unsqueeze(-1) == torch.arange(classes, device=args[0].device)).long()
        if func is torch.nn.functional.scaled_dot_product_attention:
            with sdpa_kernel([SDPBackend.MATH]):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def single_mask(x: Tensor, indices: Sequence[Any], values: Tensor, *_: Any) -> Tensor | None:
    """Where a write by indices puts one number, as a mask to be broadcast to x; None where it does anything else."""
    given = [(d, one) for d, one in enumerate(indices) if one is not None]
    if len(given) != 1 or given[0][1].dtype != torch.bool or values.numel() != 1:
        return None
    first, mask = given[0]
    return mask.view(*mask.shape, *[1] * (x.dim() - first - mask.dim()))


def written_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes into."""
    if not func._schema.is_mutable:
        return []
    schema = func._schema.arguments
    given = [*zip(schema, args, strict=False), *((one, kwargs[one.name]) for one in schema if one.name in kwargs)]
    return [tensor for one, tensor in given if one.alias_info is not None and one.alias_info.is_write]


def is_seeded(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether random numbers come from a generator of the model's own, so that they may be the same every time."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return isinstance(given.get("generator"), torch.Generator)
