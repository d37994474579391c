"""A check, for every autoregressive model, that it learns."""

import torch


def nats_of_two_images(model):
    """Of a class-conditional model of (1, 4, 4) images with 2 levels, after 60 steps on an image of each of 2 classes.
    A coin's chance for 16 pixels costs 11.1 nats."""
    x = torch.tensor([[0, 1] * 8, [1, 0] * 8]).view(2, 1, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = -model.log_prob(x, torch.tensor([0, 1])).mean()
        loss.backward()
        optimizer.step()
    return loss.item()
