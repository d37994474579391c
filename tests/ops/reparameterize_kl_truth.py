"""Inputs, gradients and float64 truth of the reparameterization, for its tests."""

import torch

from fastgen.ops.reparameterize_kl import reparameterize_kl_reference

IMPLS = ("reference", "triton")


def inputs(shape, dtype=torch.float32, device="cpu"):
    mu, eps = torch.randn(shape), torch.randn(shape)
    logvar = 2 * torch.randn(shape) - 1
    return [x.to(device, dtype).requires_grad_() for x in (mu, logvar, eps)]


def gradients(z, kl, variables):
    """Of a scalar that weighs every element of z and kl differently."""
    weight_z = torch.linspace(-1, 1, z.numel(), device=z.device).view(z.shape)
    weight_kl = torch.linspace(0.5, 1.5, kl.numel(), device=z.device)
    return torch.autograd.grad((z.to(kl.dtype) * weight_z).sum() + (kl * weight_kl).sum(), variables)


def truth(variables, **options):
    mu, logvar, eps = wide = [x.detach().double().requires_grad_() for x in variables]
    z, kl = reparameterize_kl_reference(mu, logvar, eps=eps, **options)
    return z, kl, gradients(z, kl, wide)
