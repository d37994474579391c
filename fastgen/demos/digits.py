"""The main demonstration: trains a Gated PixelCNN on digits, scores it, samples, completes images and writes a report.
Run it with `fastgen demo`."""

import importlib.metadata
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastgen import accelerate, data, likelihood, pages, plots
from fastgen._version import __version__
from fastgen.demos import baselines, completions, perform, report
from fastgen.files import make_folder, write_atomically
from fastgen.models import GatedPixelCNN
from fastgen.train import METRICS, STATE, Settings, train

SETTINGS = Settings(
    steps=600, decay_steps=600, lr=3e-3, weight_decay=0.05, validate_every=100, patience=3, max_seconds=75
)
SIZES: dict[str, Any] = {"channels": 48, "layers": 6, "dropout": 0.4}
SAMPLES = 10  # images of each class
COMPLETED = 10  # test images whose lower half is completed
VAE_STEPS = 1000
NUMBERS = "report.json"
REPEATS = 3  # timed runs of the fast and of the naive sampler, alternating; the medians count


def run(folder: str | os.PathLike, device: torch.device, *, seed: int = 0) -> int:
    """Runs the demonstration and writes all its files to `folder`.

    Returns:
        The exit status: 0, 1 if fast and naive samples differ, 130 if training was interrupted.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: scikit-learn is not installed, or the folder holds a training run that is not an earlier demo.
    """
    folder = Path(folder)
    started = time.monotonic()
    digits = data.load("digits")
    make_folder(folder)
    if (folder / NUMBERS).exists():
        (folder / STATE).unlink(missing_ok=True)  # the state of an earlier demo, which is not resumed
    elif not (folder / STATE).exists():
        write_atomically({folder / NUMBERS: b"{}\n"})
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
    numbers: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "seed": seed}
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    numbers |= {"device": device_name, "threads": torch.get_num_threads(), "parameters": parameters}
    numbers |= {"training_seconds": trained.seconds, "training_steps": trained.steps, "test_images": len(digits.test)}
    numbers |= _scores(model, digits)
    print(
        f"test: {numbers['test_bits_per_dim']:.3f} bits/dim (uniform {numbers['uniform_bits_per_dim']:.3f}, a "
        f"histogram for each position {numbers['baseline_bits_per_dim']:.3f}); Bayes' rule classifies "
        f"{numbers['test_accuracy']:.1%} of the digits rightly",
        flush=True,
    )
    numbers |= _draw(model, digits, folder, seed)
    print(
        f"samples by fastgen.accelerate and by the naive loop from the same noise: {report.sameness(numbers)}; "
        f"fastgen.accelerate was {numbers['speedup_vs_naive']:.1f} times as fast",
        flush=True,
    )
    numbers["curves"] = _curves(folder, numbers)
    print("Training a VAE on the same images", flush=True)
    numbers["vae"] = perform("vae", folder, steps=VAE_STEPS, seed=seed)
    print(f"VAE, test: at most {numbers['vae']['bits_per_dim']['importance']:.3f} bits/dim", flush=True)
    numbers["seconds"] = time.monotonic() - started
    numbers["versions"] = {"fastgen": __version__, "python": platform.python_version(), **_versions()}
    text = report.text(numbers)
    contents = {NUMBERS: json.dumps(numbers, indent=2) + "\n", "report.md": text}
    contents["report.html"] = pages.to_html(text, folder)
    write_atomically({folder / name: content.encode() for name, content in contents.items()})
    print(f"done in {numbers['seconds']:.0f} seconds; open {folder / 'report.html'}")
    return 0 if numbers["samples_identical"] else 1


def _fastest_thread_count(model: GatedPixelCNN, split: data.Split) -> int:
    """Times a training step with all of torch's threads and with one, and returns the faster number of threads. On a
    CPU that does other work as well, threads wait for each other."""
    batch = split[: SETTINGS.batch_size]
    seconds = {}
    for count in (torch.get_num_threads(), 1):
        torch.set_num_threads(count)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            model.loss(batch.images.long(), batch.labels).backward()
            times.append(time.perf_counter() - started)
        seconds[count] = median(times)
    model.zero_grad()
    return min(seconds, key=seconds.__getitem__)


def _versions() -> dict[str, str | None]:
    """Versions of the packages that the numbers could depend on; None for a package that is not installed."""
    versions: dict[str, str | None] = {}
    for name in ("torch", "triton", "numpy", "scikit-learn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _scores(model: GatedPixelCNN, digits: data.Dataset) -> dict[str, Any]:
    """Bits/dim on the test images, of the model and of the baselines, and the accuracy of Bayes' rule."""
    images, labels = digits.test.images.long(), digits.test.labels
    assert labels is not None  # digits have classes
    score = likelihood.evaluate(model, images, labels)
    predicted = likelihood.class_posterior(model, images).labels
    return {
        "test_bits_per_dim": score.bits_per_dim,
        "test_nats": score.nats,
        "test_nats_standard_error": score.standard_error,
        "baseline_bits_per_dim": baselines.histogram_bits_per_dim(digits, digits.test),
        "uniform_bits_per_dim": baselines.uniform_bits_per_dim(digits),
        "test_accuracy": float((predicted == labels).double().mean()),
    }


def _draw(model: GatedPixelCNN, digits: data.Dataset, folder: Path, seed: int) -> dict[str, Any]:
    """Draws samples of each class with the fast and with the naive sampler from the same noise, times both, and writes
    samples.png and completions.png."""
    device = next(model.parameters()).device
    classes = torch.arange(model.n_classes or 0, device=device).repeat_interleave(SAMPLES)
    options: dict[str, Any] = {"distribution": model.distribution, "condition": classes[:1]}
    fast, naive = (accelerate(model, model.shape, backend=backend, **options) for backend in ("auto", "naive"))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(fast.noise_shape(len(classes)), generator=generator).to(device)
    images, _ = _timed(fast, noise, classes)  # the first call plans and compiles
    runs = [(_timed(fast, noise, classes), _timed(naive, noise, classes)) for _ in range(REPEATS)]
    fast_seconds, naive_seconds = (median(run[side][1] for run in runs) for side in (0, 1))
    names = [str(label) for label in range(model.n_classes or 0)]
    plots.image_grid(images, model.levels, folder / "samples.png", columns=SAMPLES, row_names=names)
    completed = digits.test[:COMPLETED]
    known = completions.upper_half(digits.shape)
    path = folder / "completions.png"
    completions.complete(fast, completed.images, known, path, condition=completed.labels, seed=seed)
    return {
        "samples_identical": all(torch.equal(drawn, images) for run in runs for drawn, _ in run),
        "fast_seconds": fast_seconds,
        "naive_seconds": naive_seconds,
        "speedup_vs_naive": naive_seconds / fast_seconds,
        "sampling_batch": len(classes),
        "sampling_backend": fast.explain(),
        "work_ratio": fast.work_ratio,
        "naive_work_ratio": naive.work_ratio,
    }


def _timed(sampler: Any, noise: Tensor, classes: Tensor) -> tuple[Tensor, float]:
    """Images from the noise on the CPU, and the seconds that drawing them took."""
    started = time.perf_counter()
    images = sampler.sample(len(classes), noise=noise, condition=classes).cpu()
    return images, time.perf_counter() - started


def _curves(folder: Path, numbers: dict[str, Any]) -> bool:
    """Writes curves.png, the loss over the training steps. Returns False if matplotlib is not installed."""
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    lines = {
        "uniform": numbers["uniform_bits_per_dim"],
        "histogram": numbers["baseline_bits_per_dim"],
        "test": numbers["test_bits_per_dim"],
    }
    written = plots.curves(rows, folder / "curves.png", lines=lines)
    if not written:
        print("curves.png needs matplotlib: pip install matplotlib")
    return written
