"""`patch`: turns the masked convolutions of an existing model into `MaskedConv2d`."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.nn.masked_conv import MaskedConv2d, live_box, state_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class PatchedConv2d(MaskedConv2d):
    """The class that `patch` gives to a masked convolution. The module stays the same object, with the same parameters
    and buffers.

    Its mask stays in the module's own buffer, of any dtype and of any shape that broadcasts to the weight's. `_live` is
    the mask as a BoolTensor of the weight's shape; it is recomputed when the buffer has changed.
    """

    _live: Tensor
    _mask_name: str

    def live_mask(self) -> Tensor:
        source = self.get_buffer(self._mask_name)
        if not torch.compiler.is_compiling() and self._live_of != state_of(source):
            self._read_mask()
        return self._live

    def _read_mask(self) -> None:
        source = self.get_buffer(self._mask_name)
        live = source.bool().expand(self.weight.shape).contiguous()
        self.register_buffer("_live", live, persistent=False)
        self._live_of = state_of(source)
        self._box, self._box_of = live_box(live), state_of(live)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        nn.Conv2d._load_from_state_dict(self, *arguments)


def patch(model: nn.Module) -> int:
    """Turns the masked convolutions of `model` into `fastgen.nn.MaskedConv2d`, in place.

    Masked convolutions are instances of subclasses of `nn.Conv2d` whose weights (O, I, kh, kw) are multiplied, or
    overwritten, by a buffer of zeros and ones of any name, any dtype and any shape that broadcasts to the weight's.
    Each keeps its identity, its Parameter objects and its buffers, and therefore its state_dict. Before a module is
    changed, it is run on small random inputs; it is left alone if a masked convolution gives other results or
    gradients.

    Other modules are left alone: those with groups, padding modes other than zeros, a forward with more arguments than
    the input, hooks, weights that are not Parameters (weight_norm and other parametrizations), further parameters or
    submodules, masks with values other than 0 and 1, or masks that are not buffers.

    One thing changes in training: the gradient of a masked weight is exactly zero. Code that overwrites masked weights
    computes a gradient for them and ignores it.

    Args:
        model: any module, also a single masked convolution.

    Returns:
        The number of convolutions that were changed; 0 on a second call.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    count = 0
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d) and not isinstance(module, MaskedConv2d) and _may_be_masked(module):
            name = next((name for name in _masks(module) if _reproduces(module, name)), None)
            if name is not None and _convert(module, name):
                count += 1
    return count


def _may_be_masked(module: nn.Conv2d) -> bool:
    """Whether nothing but its mask keeps a module from being a MaskedConv2d; see `patch` for what is left alone."""
    if type(module) is nn.Conv2d or module.groups != 1 or module.padding_mode != "zeros" or module._modules:
        return False
    if any(getattr(module, hooks) for hooks in HOOKS) or not set(module._parameters) <= {"weight", "bias"}:
        return False
    weight = module._parameters.get("weight")
    if weight is None or weight.device.type == "meta" or isinstance(weight, nn.parameter.UninitializedParameter):
        return False
    parameters = list(inspect.signature(module.forward).parameters.values())
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return len([parameter for parameter in parameters if parameter.kind not in variadic]) <= 1


def _masks(module: nn.Conv2d) -> list[str]:
    """Names of the buffers that can be the mask; buffers with a zero come first."""
    candidates = []
    for name, buffer in module._buffers.items():
        if buffer is None or not 2 <= buffer.dim() <= 4 or buffer.is_complex():
            continue
        shape = (1,) * (4 - buffer.dim()) + tuple(buffer.shape)
        if any(side not in (1, full) for side, full in zip(shape, module.weight.shape, strict=True)):
            continue
        if not ((buffer == 0) | (buffer == 1)).all():
            continue
        masks_something = bool((buffer == 0).any())
        if masks_something or "mask" in name.lower():
            candidates.append((not masks_something, name))
    return [name for _, name in sorted(candidates)]


def _reproduces(module: nn.Conv2d, name: str) -> bool:
    """Whether a convolution masked by the buffer `name` has the module's results and gradients.

    Both are compared on the CPU, in float64, in training and in evaluation mode. A copy of the module gets random
    parameters: its own may be zero and hide a difference."""
    generator = torch.Generator().manual_seed(0)
    try:
        twin = copy.deepcopy(module).cpu().double()
        for training, scale in ((True, 1.0), (False, 1e3)):
            twin.train(training)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
                    parameter.requires_grad_()
            size = [
                d * (k - 1) + 2 * s + more
                for d, k, s, more in zip(twin.dilation, twin.kernel_size, twin.stride, (2, 3), strict=True)
            ]
            x = scale * torch.randn(2, twin.in_channels, *size, generator=generator, dtype=torch.float64)
            if not _same(twin, name, x.requires_grad_()):
                return False
    except Exception:  # a foreign forward may raise anything for an input of this size
        return False
    return True


def _same(twin: nn.Conv2d, name: str, x: Tensor) -> bool:
    """Whether twin(x) and its gradients are those of a convolution masked by the buffer `name`."""
    mask = twin.get_buffer(name).bool().expand(twin.weight.shape)
    weight, bias = twin.weight.detach().clone().requires_grad_(), twin.bias
    expected = F.conv2d(x, torch.where(mask, weight, 0), bias, twin.stride, twin.padding, twin.dilation)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        output = twin(x)
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    others = [x] if bias is None else [x, bias]
    grad = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    expected_gradients = torch.autograd.grad(expected, [weight, *others], grad)
    gradients = list(torch.autograd.grad(output, [twin.weight, *others], grad))
    gradients[0] = torch.where(mask, gradients[0], 0)
    return all(
        torch.allclose(actual, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
        for actual, wanted in zip((output, *gradients), (expected, *expected_gradients), strict=True)
    )


def _convert(module: nn.Conv2d, name: str) -> bool:
    """Makes a module a PatchedConv2d whose mask is the buffer `name`. Returns False if Python cannot change its class,
    or if the module already has an attribute that PatchedConv2d sets."""
    if any(name in vars(module) or name in module._buffers for name in ("_live", "_mask_name", "_live_of", "_box")):
        return False
    try:
        module.__class__ = PatchedConv2d
    except TypeError:  # the class has slots
        return False
    vars(module).setdefault("mask_type", None)
    patched: Any = module
    patched.activation = "none"
    patched._mask_name = name
    patched._read_mask()
    return True
