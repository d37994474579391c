"""The report that `fastgen demo` writes."""

from typing import Any


def sameness(numbers: dict[str, Any]) -> str:
    return "identical, pixel for pixel" if numbers["samples_identical"] else "DIFFERENT: this is a bug"


def text(numbers: dict[str, Any]) -> str:
    """The report as Markdown, from the numbers of report.json. It shows the pictures that lie in the same folder."""
    count = numbers["sampling_batch"]
    vae = numbers["vae"]["bits_per_dim"]
    curves = "\n![bits/dim over training steps](curves.png)\n" if numbers["curves"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items() if version)
    return f"""# {count} digits, {numbers["speedup_vs_naive"]:.0f} times as fast, and {sameness(numbers)}

A PixelCNN draws an image pixel by pixel. The usual loop runs the whole network once for every pixel;
`fastgen.accelerate` computes each activation once for the whole image. From the same random numbers both draw the same
images. Here are {count} of them, one row for each class, drawn from a model that this run trained:

![samples of each class](samples.png)

| {count} images of 8x8 | seconds | multiply-adds, in forward passes |
|---|---|---|
| the loop | {numbers["naive_seconds"]:.2f} | {numbers["naive_work_ratio"]:.3g} |
| **`fastgen.accelerate`** | **{numbers["fast_seconds"]:.3f}** | **{numbers["work_ratio"]:.3g}** |

Measured side by side on {numbers["date"]} (device: {numbers["device"]}, CPU threads: {numbers["threads"]}). The times
are medians of alternating runs; they leave out planning and compiling, which happen once.

## How good the model is

A class-conditional Gated PixelCNN ({numbers["parameters"]:,} parameters; van den Oord et al. 2016) on scikit-learn's
handwritten digits (8x8, 17 grey levels), trained for {numbers["training_steps"]} steps in
{numbers["training_seconds"]:.0f} seconds.

| on the {numbers["test_images"]} test images | bits/dim |
|---|---|
| uniform over the levels | {numbers["uniform_bits_per_dim"]:.3f} |
| a histogram for each position | {numbers["baseline_bits_per_dim"]:.3f} |
| the VAE below | at most {vae["importance"]:.3f} |
| **Gated PixelCNN** | **{numbers["test_bits_per_dim"]:.3f}** |

That is {numbers["test_nats"]:.2f} nats per image (standard error {numbers["test_nats_standard_error"]:.2f}). Bayes'
rule over the ten classes classifies {numbers["test_accuracy"]:.1%} of the test digits rightly.
{curves}
## Completions

Each row shows a test image, the upper half of it, which is all that the model sees, and four completions.

![completions](completions.png)

## A VAE on the same images

A VAE has latent variables instead of an order of the pixels, and draws an image in one pass of its decoder. It needs at
most {vae["importance"]:.3f} bits/dim on the test images (64 importance samples; {vae["elbo"]:.3f} by the ELBO).

![samples, reconstructions and interpolations of the VAE](vae.png)

## How the samples were drawn

```
{numbers["sampling_backend"]}
```

## Reproduce it

`python -m fastgen demo --seed {numbers["seed"]}` took {numbers["seconds"]:.0f} seconds in all, with {versions}.

The folder of this page also holds the model (`model.safetensors` and `config.json`, read by `fastgen.load`), the
training curves (`metrics.jsonl`) and the numbers of this page (`report.json`).
"""
