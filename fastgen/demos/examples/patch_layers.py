"""Replace the masked layers of an existing PixelCNN by fastgen's, and go on training it with the same optimizer."""

import torch
from torch.nn import functional as F

import fastgen
from fastgen.demos.examples.any_model import build


def main(steps=20, levels=4):
    model = build(levels).train()  # your model, perhaps with weights from a checkpoint
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    stripes = (torch.arange(16) // 2 % levels).expand(8, 1, 16, 16)
    x = stripes / (levels - 1) * 2 - 1
    before = model(x)
    replaced = fastgen.patch(model)  # in place: parameters, state_dict keys and outputs stay
    difference = (model(x) - before).abs().max().item()
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), stripes[:, 0])  # nats a pixel
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return replaced, difference, losses


if __name__ == "__main__":
    replaced, difference, losses = main()
    print(f"{replaced} layers replaced, outputs differ by at most {difference:.1e}")
    print(f"training loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per pixel")
