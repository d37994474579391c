"""Bits/dim of the models on scikit-learn's digits, over their number of parameters.

python -m benchmarks.figures.digits measure    trains each for 600 steps and appends to rows/digits.jsonl; ten minutes
python -m benchmarks.figures.digits draw       draws docs/digits.png from these rows
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures.style import COLOURS, MARKERS, figure
from benchmarks.harness import machine, rows
from fastgen import data, likelihood
from fastgen.demos import baselines
from fastgen.models import VAE, GatedPixelCNN, PixelCNN, PixelRNN
from fastgen.train import Settings, train

ROWS = Path(__file__).parent / "rows" / "digits.jsonl"
PICTURE = machine.ROOT / "docs" / "digits.png"
MODELS: list[tuple[type, dict[str, Any]]] = [
    *((VAE, {"latent_dim": 8, "likelihood": "logistic_mixture", "n_mix": 3, "channels": c}) for c in (8, 16, 32)),
    *((GatedPixelCNN, {"channels": c, "layers": 5, "dropout": 0.2}) for c in (8, 16, 32)),
    *((PixelCNN, {"channels": c, "layers": 5}) for c in (6, 12, 24)),
    *((PixelRNN, {"hidden_channels": h, "layers": 3}) for h in (6, 12, 24)),
]
SETTINGS = Settings(steps=600, decay_steps=600, lr=3e-3, weight_decay=0.05)


def measure(models: list[tuple[type, dict[str, Any]]] = MODELS, settings: Settings = SETTINGS) -> Iterator[dict]:
    """A row for each model: bits/dim on the test images, for the VAE an upper bound (64 importance samples)."""
    torch.set_num_threads(1)
    digits = data.load("digits")
    facts = {**machine.facts("cpu"), "time": rows.now(), "steps": settings.steps}
    uniform, histogram = baselines.uniform_bits_per_dim(digits), baselines.histogram_bits_per_dim(digits, digits.test)
    for kind, sizes in models:
        started = time.process_time()
        torch.manual_seed(0)
        model = kind(digits.shape, levels=digits.levels, **sizes)
        with tempfile.TemporaryDirectory() as folder:
            train(model, digits, folder, settings, progress=False, device="cpu")
        score = likelihood.evaluate(model, digits.test.images.long(), seed=0)
        row = {"model": kind.__name__, "sizes": sizes, "parameters": sum(p.numel() for p in model.parameters())}
        row |= {"bits_per_dim": score.bits_per_dim, "exact": score.exact, "cpu_s": time.process_time() - started}
        yield {**row, "uniform": uniform, "histogram": histogram, **facts}


def draw(saved: list[dict[str, Any]], target: Path = PICTURE) -> Path:
    """Draws bits/dim over the number of parameters, with a line for each class of models; returns `target`."""
    latest = {(row["model"], row["parameters"]): row for row in saved}
    with figure(target, (7, 4.2)) as page:
        axes = page.subplots()
        for number, kind in enumerate(dict.fromkeys(row["model"] for row in saved)):
            rows_of_kind = [latest[key] for key in sorted(latest) if key[0] == kind]
            values = [row["bits_per_dim"] for row in rows_of_kind]
            label = kind if rows_of_kind[0]["exact"] else f"{kind} (at most)"
            style = {"color": COLOURS[number], "marker": MARKERS[number]}
            axes.plot([row["parameters"] for row in rows_of_kind], values, label=label, **style)
        axes.axhline(saved[0]["histogram"], color=COLOURS[7], linestyle="--", marker="", linewidth=1)
        axes.annotate("a histogram for each position", (min(row["parameters"] for row in saved), saved[0]["histogram"]),
                      xytext=(0, 4), textcoords="offset points", color=COLOURS[7], fontsize=9)  # fmt: skip
        axes.set_xscale("log")
        axes.set(xlabel="parameters", ylabel="bits/dim on the test images")
        axes.set_title(f"scikit-learn's digits, {saved[0]['steps']} steps of training", fontsize=11)
        axes.legend(frameon=False)
    return target


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        for row in measure():
            rows.save([row], ROWS)
            print(row["model"], row["parameters"], row["bits_per_dim"], round(row["cpu_s"]), flush=True)
    print(draw(rows.read(ROWS)))
