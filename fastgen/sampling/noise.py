"""The uniforms that decide a batch of images."""

import operator

import torch
from torch import Tensor

from fastgen.ops._implementation import may_read_values


def uniforms(shape: tuple[int, ...], seed: int | torch.Generator | None, device: torch.device) -> Tensor:
    """float32 uniforms in [0, 1) on `device`.

    An int gives the same noise on every device. A generator draws on its own device; None is torch's default
    generator of `device`.

    Raises:
        TypeError, ValueError: seed is none of these, or an int that a generator does not take.
    """
    if seed is None:
        return torch.rand(shape, device=device)
    if isinstance(seed, torch.Generator):
        generator = seed
    else:
        try:
            generator = torch.Generator().manual_seed(operator.index(seed))
        except TypeError:
            raise TypeError(f"seed must be an int, a torch.Generator or None, got {seed!r}") from None
        except (RuntimeError, ValueError, OverflowError) as error:
            raise ValueError(f"seed must fit into 64 bits, got {seed!r}") from error
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError where `noise` is not float32 uniforms in [0, 1) of this shape."""
    if not isinstance(noise, Tensor) or noise.dtype != torch.float32:
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"noise must be a float32 tensor, got {got}")
    if tuple(noise.shape) != tuple(shape):
        raise ValueError(f"noise must have the shape {tuple(shape)}, as noise_shape(n) says, got {tuple(noise.shape)}")
    if may_read_values(noise) and not bool(((noise >= 0) & (noise < 1)).all()):
        raise ValueError("noise must hold uniforms in [0, 1), got values outside (or NaN)")
