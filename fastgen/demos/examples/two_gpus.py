"""Train on one GPU, on several, or in several processes on a CPU, with the same program:

    python -m fastgen.demos.examples.two_gpus
    torchrun --nproc-per-node 2 -m fastgen.demos.examples.two_gpus

The processes share each step and each validation; the bits/dim that they measure do not depend on their number.
"""

import sys

import torch

from fastgen import data, distributed
from fastgen.models import GatedPixelCNN
from fastgen.train import Settings, train


def main(folder="runs/two_gpus", steps=100):
    with distributed.processes():  # joins the processes that torchrun started; rank 0 prints and writes
        torch.manual_seed(0)  # all processes start from the same weights
        digits = data.load("digits")
        model = GatedPixelCNN(digits.shape, digits.levels, channels=16, layers=3)
        device = f"cuda:{distributed.local_rank()}" if torch.cuda.is_available() else "cpu"
        settings = Settings(steps=steps, batch_size=64, validate_every=steps)  # 64 images a step over all processes
        result = train(model, digits, folder, settings, device=device)
        print(f"processes: {distributed.world_size()}, bits/dim on the validation images: {result.best:.6f}")
        return result.best


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
