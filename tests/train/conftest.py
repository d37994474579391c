import pytest
import torch

from fastgen.data import Dataset, Split


@pytest.fixture(scope="session")
def stripes():
    """Images of two classes: rows of 3, 0, 3, 0 and of 0, 3, 0, 3, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = (torch.arange(4).view(1, 1, 4, 1) + labels.view(-1, 1, 1, 1)) % 2 * 3
    images = images.repeat(1, 1, 1, 3)
    images[torch.rand(images.shape, generator=generator) < 0.05] = 1
    every = Split(images.to(torch.uint8), labels)
    return Dataset("stripes", 4, 2, every[:20], every[20:30], every[30:])
