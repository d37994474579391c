"""The page that `fastgen demo` leaves behind."""

from typing import Any


def sameness(numbers: dict[str, Any]) -> str:
    return "identical, pixel for pixel" if numbers["samples_identical"] else "DIFFERENT: this is a bug"


def text(numbers: dict[str, Any]) -> str:
    """Markdown of the numbers in report.json, with the pictures beside it."""
    count = numbers["sampling_batch"]
    vae = numbers["vae"]["bits_per_dim"]
    curves = "\n![bits/dim over training steps](curves.png)\n" if numbers["curves"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items() if version)
    return f"""# {count} digits, {numbers["speedup_vs_naive"]:.0f} times as fast, and {sameness(numbers)}

A PixelCNN draws an image pixel by pixel, and the usual loop runs the whole network once for each of them.
`fastgen.accelerate` computes each activation once for the whole image. From the same random numbers both draw the
same images; these are {count}, a row for each class, of a model that this run trained:

![samples of each class](samples.png)

| {count} images of 8x8 | seconds | network passes' worth of multiply-adds |
|---|---|---|
| the loop | {numbers["naive_seconds"]:.2f} | {numbers["naive_work_ratio"]:.3g} |
| **`fastgen.accelerate`** | **{numbers["fast_seconds"]:.3f}** | **{numbers["work_ratio"]:.3g}** |

Measured side by side on {numbers["date"]}. Device: {numbers["device"]}, with {numbers["threads"]} of the CPU's threads;
medians of runs in turns. What was built and compiled beforehand is not counted.

## How good the model is

A class-conditional Gated PixelCNN ({numbers["parameters"]:,} parameters; van den Oord et al. 2016) on scikit-learn's
handwritten digits (8x8, 17 grey levels), trained for {numbers["training_steps"]} steps in
{numbers["training_seconds"]:.0f} seconds.

| on the {numbers["test_images"]} test images | bits/dim |
|---|---|
| all levels alike | {numbers["uniform_bits_per_dim"]:.3f} |
| a histogram for each position | {numbers["baseline_bits_per_dim"]:.3f} |
| a VAE, below | at most {vae["importance"]:.3f} |
| **Gated PixelCNN** | **{numbers["test_bits_per_dim"]:.3f}** |

That is {numbers["test_nats"]:.2f} nats an image (standard error {numbers["test_nats_standard_error"]:.2f}). Bayes' rule
over the ten classes names {numbers["test_accuracy"]:.1%} of the test digits rightly.
{curves}
## Completions

Each row: a test image, its upper half, which is all that the model is shown, and four completions that it drew.

![completions](completions.png)

## A VAE on the same images

Latent variables instead of an order of the pixels: an image in one pass of the network, and at most
{vae["importance"]:.3f} bits/dim on the test images (64 importance samples; {vae["elbo"]:.3f} by the ELBO).

![samples, reconstructions and interpolations of the VAE](vae.png)

## How the samples were drawn

```
{numbers["sampling_backend"]}
```

## Do it again

`python -m fastgen demo --seed {numbers["seed"]}` took {numbers["seconds"]:.0f} seconds in all. {versions}. Beside this
page, `model.safetensors` with `config.json` is the model (`fastgen.load`), `metrics.jsonl` what was measured while it
was trained, `report.json` this page's numbers.
"""
