"""Use the loss of a VAE in your own training loop: two fused operations instead of the usual ten lines."""

import torch
from torch import nn

from fastgen.ops import elbo, reparameterize_kl


def main(images=None, steps=100, latent=4):
    images = (torch.rand(64, 1, 8, 8) > 0.5).float() if images is None else images  # black and white, 0. or 1.
    size = images[0].numel()
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 2 * latent))
    decoder = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, size), nn.Unflatten(1, images.shape[1:]))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    history = []
    for _ in range(steps):
        mu, logvar = encoder(images).chunk(2, 1)
        z, kl = reparameterize_kl(mu, logvar)  # on a GPU the kernel draws the noise and does not store it; kl (B,) nats
        bound, _, _ = elbo(decoder(z), images, kl, "bernoulli")  # -(nll + kl), nll and kl, each (B,) nats
        loss = -bound.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


if __name__ == "__main__":
    history = main()
    print(f"-ELBO {history[0]:.2f} -> {history[-1]:.2f} nats per image")
