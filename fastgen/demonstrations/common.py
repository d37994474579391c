"""What the demonstrations share: a training loop, and how a result is put down."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

BATCH, RATE = 64, 2e-3


def train(model: nn.Module, loss: Callable[[Tensor, int], Tensor], images: int, steps: int) -> None:
    """Adam, the learning rate rising for a tenth of the steps and falling afterwards (Smith & Topin 2018).

    Args:
        loss: indices of the batch's images, and the number of the step, -> ().
        images: their number; a batch is drawn with replacement.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(images, (BATCH,)), step).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def put_down(out: str | Path | None, name: str, numbers: dict[str, Any], picture: Image.Image) -> dict[str, Any]:
    """Writes OUT/NAME.png and OUT/NAME.json, where there is a folder; returns the numbers with the picture's path."""
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.json").write_text(json.dumps(numbers, indent=2) + "\n")
        numbers = {**numbers, "picture": str(folder / f"{name}.png")}
    return numbers
