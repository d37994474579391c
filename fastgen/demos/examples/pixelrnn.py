"""Train PixelRNN (van den Oord et al. 2016) on digits, score it, and complete images from their upper half."""

import torch

import fastgen
from fastgen import data, likelihood
from fastgen.models import PixelRNN
from fastgen.train import Settings, train


def main(folder="runs/pixelrnn", steps=200, digits=None, hidden_channels=16, layers=2):
    digits = digits or data.load("digits")  # 8x8, levels 0..16
    sizes = {"kind": "diagonal_bilstm", "hidden_channels": hidden_channels, "layers": layers}
    model = PixelRNN(digits.shape, digits.levels, **sizes)
    result = train(model, digits, folder, Settings(steps=steps, lr=3e-3, warmup=steps // 10))  # Ctrl-C saves the run
    print(f"{result.reason} after {result.steps} steps")

    model = fastgen.load(folder)  # the weights that were best on the validation images
    test = digits.test.images[:64].long()
    score = likelihood.evaluate(model, test)
    known = torch.zeros(1, 1, *digits.shape[1:], dtype=torch.bool)
    known[:, :, : digits.shape[1] // 2] = True
    completed = model.sample(8, seed=0, known=test[:8], known_mask=known)
    return score, completed, test


if __name__ == "__main__":
    score, completed, _ = main()
    print(f"test: {score}\ncompletions: {tuple(completed.shape)}")
