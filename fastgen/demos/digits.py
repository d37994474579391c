"""The main job, start to end: train on real images, score, sample, complete, report. See `fastgen demo --help`."""

import importlib.metadata
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import accelerate, data, likelihood, plots
from fastgen._version import __version__
from fastgen.demos import baselines, completions, perform
from fastgen.files import write_atomically
from fastgen.models import GatedPixelCNN
from fastgen.train import METRICS, Settings, train

SETTINGS = Settings(
    steps=800, decay_steps=800, lr=3e-3, weight_decay=0.05, validate_every=100, patience=3, max_seconds=170
)
SIZES: dict[str, Any] = {"channels": 48, "layers": 6, "dropout": 0.4}
SAMPLES = 10  # of each class
COMPLETED = 10  # test images whose lower half is drawn anew
VAE_STEPS = 1500
REPEATS = 3  # of the accelerated sampling; the median counts


def run(folder: str | os.PathLike, device: torch.device, *, seed: int = 0) -> int:
    """Writes everything to the folder and returns the exit status: 1 where fast and naive samples differ, 130 where
    training was interrupted.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    started = time.monotonic()
    digits = data.load("digits")
    count = f"{len(digits.train)} to train, {len(digits.validation)} for validation, {len(digits.test)} for test"
    print(f"scikit-learn's handwritten digits, 8x8, 17 grey levels: {count}", flush=True)
    torch.manual_seed(seed)
    model = GatedPixelCNN(digits.shape, digits.levels, n_classes=digits.n_classes, **SIZES)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"Training a class-conditional Gated PixelCNN ({parameters:,} parameters) on {device}", flush=True)
    if device.type == "cpu":
        torch.set_num_threads(_fastest_thread_count(model, digits.train))
    trained = train(model, digits, folder, replace(SETTINGS, seed=seed), device=device)
    if trained.reason == "interrupted":
        print(f"interrupted at step {trained.steps}; the model so far is in {folder}")
        return 130
    report: dict[str, Any] = {"device": _device_name(device), "threads": torch.get_num_threads()}
    report |= {"training_seconds": trained.seconds, "training_steps": trained.steps, "parameters": parameters}
    report |= _scores(model, digits)
    print(
        f"test: {report['test_bits_per_dim']:.3f} bits/dim (uniform {report['uniform_bits_per_dim']:.3f}, a histogram "
        f"for each position {report['baseline_bits_per_dim']:.3f}); Bayes' rule names "
        f"{report['test_accuracy']:.1%} of the digits",
        flush=True,
    )
    report |= _draw(model, digits, folder, seed)
    same = "identical, pixel for pixel" if report["samples_identical"] else "DIFFERENT"
    print(
        f"samples of fastgen.accelerate and of the naive loop from the same noise: {same}; "
        f"{report['speedup_vs_naive']:.1f} times as fast",
        flush=True,
    )
    _curves(folder, report)
    print("Training a VAE on the same images", flush=True)
    report["vae"] = perform("vae", folder, steps=VAE_STEPS, seed=seed)
    print(f"test: at most {report['vae']['bits_per_dim']['importance']:.3f} bits/dim", flush=True)
    report["seconds"] = time.monotonic() - started
    report["versions"] = {"fastgen": __version__, "python": platform.python_version(), **_versions()}
    write_atomically(
        {
            folder / "report.json": (json.dumps(report, indent=2) + "\n").encode(),
            folder / "report.md": _text(report).encode(),
        }
    )
    print(f"{report['seconds']:.0f} seconds; pictures and report.md in {folder}")
    return 0 if report["samples_identical"] else 1


def _fastest_thread_count(model: GatedPixelCNN, split: data.Split) -> int:
    """All of torch's threads, or one where that is faster: on a CPU with other work, threads wait for each other."""
    most = torch.get_num_threads()
    images, labels = split.images[: SETTINGS.batch_size].long(), split.labels
    seconds = {}
    for count in (most, 1):
        torch.set_num_threads(count)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            model.loss(images, labels[: len(images)] if labels is not None else None).backward()
            times.append(time.perf_counter() - started)
        seconds[count] = sorted(times)[1]
    model.zero_grad()
    return min(seconds, key=seconds.__getitem__)


def _versions() -> dict[str, str | None]:
    """Of the packages that the numbers could depend on; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in ("torch", "triton", "numpy", "scikit-learn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _scores(model: GatedPixelCNN, digits: data.Dataset) -> dict[str, Any]:
    """Bits/dim on the test images beside the baselines, and how many of them Bayes' rule classifies rightly."""
    images, labels = digits.test.images.long(), digits.test.labels
    assert labels is not None  # digits have classes
    score = likelihood.evaluate(model, images, labels)
    named = likelihood.class_posterior(model, images).labels
    return {
        "test_bits_per_dim": score.bits_per_dim,
        "test_nats": score.nats,
        "test_nats_standard_error": score.standard_error,
        "baseline_bits_per_dim": baselines.histogram_bits_per_dim(digits, digits.test),
        "uniform_bits_per_dim": baselines.uniform_bits_per_dim(digits),
        "test_accuracy": float((named == labels).double().mean()),
    }


def _draw(model: GatedPixelCNN, digits: data.Dataset, folder: Path, seed: int) -> dict[str, Any]:
    """Samples of each class, fast and naive from the same noise, timed side by side; completions."""
    device = next(model.parameters()).device
    classes = torch.arange(model.n_classes or 0, device=device).repeat_interleave(SAMPLES)
    options: dict[str, Any] = {"distribution": model.distribution, "condition": classes[:1]}
    fast, naive = (accelerate(model, model.shape, backend=backend, **options) for backend in ("auto", "naive"))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(fast.noise_shape(len(classes)), generator=generator).to(device)
    _timed(fast, noise, classes)  # builds and compiles what there is to build
    runs = sorted((_timed(fast, noise, classes) for _ in range(REPEATS)), key=lambda pair: pair[1])
    images, fast_seconds = runs[REPEATS // 2]
    naive_images, naive_seconds = _timed(naive, noise, classes)
    names = [str(label) for label in range(model.n_classes or 0)]
    plots.image_grid(images, model.levels, folder / "samples.png", columns=SAMPLES, row_names=names)
    completed = digits.test[:COMPLETED]
    known = completions.upper_half(digits.shape)
    path = folder / "completions.png"
    completions.complete(fast, completed.images, known, path, condition=completed.labels, seed=seed)
    return {
        "samples_identical": all(torch.equal(drawn, naive_images) for drawn, _ in runs),
        "speedup_vs_naive": naive_seconds / fast_seconds,
        "sampling_batch": len(classes),
        "sampling_backend": fast.explain(),
        "work_ratio": fast.work_ratio,
        "naive_work_ratio": naive.work_ratio,
    }


def _timed(sampler: Any, noise: Tensor, classes: Tensor) -> tuple[Tensor, float]:
    """Images from the noise, and the seconds that they took."""
    started = time.perf_counter()
    images = sampler.sample(len(classes), noise=noise, condition=classes).cpu()
    return images, time.perf_counter() - started


def _curves(folder: Path, report: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    lines = {
        "uniform": report["uniform_bits_per_dim"],
        "histogram": report["baseline_bits_per_dim"],
        "test": report["test_bits_per_dim"],
    }
    if not plots.curves(rows, folder / "curves.png", lines=lines):
        print("curves.png needs matplotlib: pip install matplotlib")


def _text(report: dict[str, Any]) -> str:
    same = "**identical, pixel for pixel**" if report["samples_identical"] else "**different: this is a bug**"
    return f"""# fastgen demo

A class-conditional Gated PixelCNN ({report["parameters"]:,} parameters) on scikit-learn's handwritten digits (8x8, 17
grey levels), trained for {report["training_steps"]} steps in {report["training_seconds"]:.0f} seconds. Device:
{report["device"]}, with {report["threads"]} of the CPU's threads.

| on the 297 test images | bits/dim |
|---|---|
| all levels alike | {report["uniform_bits_per_dim"]:.3f} |
| a histogram for each position | {report["baseline_bits_per_dim"]:.3f} |
| **Gated PixelCNN** | **{report["test_bits_per_dim"]:.3f}** |

That is {report["test_nats"]:.2f} nats an image (standard error {report["test_nats_standard_error"]:.2f}). Bayes' rule
over the ten classes names {report["test_accuracy"]:.1%} of the test digits rightly.

![loss over steps](curves.png)

## Samples

{report["sampling_batch"]} images, a row for each class. From the same noise `fastgen.accelerate` and the naive loop,
which runs the whole network once for every pixel, draw images that are {same}. In this run
`accelerate` was **{report["speedup_vs_naive"]:.1f} times as fast**. In multiply-adds an image costs it
{report["work_ratio"]:.3g} forward passes of the network, and the naive loop {report["naive_work_ratio"]:.3g}.

![samples of each class](samples.png)

## Completions

A test image, its upper half, and four completions of it drawn by the model.

![completions](completions.png)

## A VAE on the same images

Latent variables instead of an order of the pixels: an image in one pass of the network, and at most
{report["vae"]["bits_per_dim"]["importance"]:.3f} bits/dim on the test images (64 importance samples;
{report["vae"]["bits_per_dim"]["elbo"]:.3f} by the ELBO).

![samples, reconstructions and interpolations of the VAE](vae.png)

## How the samples were drawn

```
{report["sampling_backend"]}
```

`model.safetensors` with `config.json` is the model (`fastgen.load`), `metrics.jsonl` what was measured while it was
trained, `report.json` this report's numbers.
"""
