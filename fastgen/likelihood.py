"""What a model with a likelihood is good for: bits/dim, classification by Bayes' rule, and rejecting unlikely inputs.

A model here is anything with `log_prob(x, condition=None) -> (B,)` nats for integer levels x (B, C, H, W): every model
of `fastgen.models` but the autoencoder. Further options, such as the VAE's n_samples, are handed on to `log_prob`.
Outlier scores are all oriented alike: the higher, the less the input looks like the training data.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen import distributed
from fastgen.checkpoint import unwrap
from fastgen.distributed import seeded
from fastgen.models import VAE

Images = Tensor | Iterable[Tensor | Sequence[Tensor]]


def bits_per_dim(nll: Any, shape: Sequence[int]) -> Any:
    """nll / (C * H * W * ln 2) for nats an image, numbers or tensors, and the shape (C, H, W) of one."""
    return nll / (math.prod(shape) * math.log(2))


# --- scoring a data set


@torch.no_grad()
def log_likelihoods(
    model: Any,
    images: Images,
    condition: Tensor | None = None,
    *,
    batch_size: int = 256,
    seed: int | None = None,
    shared: bool = False,
    **options: Any,
) -> Tensor:
    """log p(x) of every image, or log p(x | y) of a class-conditional model.

    Args:
        model: a model in evaluation mode; see the module's docstring.
        images: integer levels (N, C, H, W), or batches such as a DataLoader gives: images, or pairs of images and
            classes (the classes are used where the model is class-conditional).
        condition: classes (N,), with a tensor of images.
        batch_size: images at a time, with a tensor of images.
        seed: of random numbers in `log_prob` (a VAE), drawn anew for each batch; None leaves them to torch's generator.
        shared: whether the processes of a job (`fastgen.distributed`) take the batches in turns; all of them must call,
            with the same images, and all get all results.
        options: for `model.log_prob`.

    Returns:
        (N,) nats, float64 on the CPU.

    Raises:
        TypeError: the model has no log_prob.
        ValueError: the model is in training mode, there are not as many classes as images, or batch_size < 1.
    """
    model = unwrap(model)
    if not callable(getattr(model, "log_prob", None)):
        raise TypeError(f"model must have log_prob(x, condition=None), {type(model).__name__} has not")
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("model is in training mode (dropout is on): call model.eval() before scoring")
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    conditional = condition is not None or getattr(model, "n_classes", None) is not None
    device = torch.device("cpu") if parameter is None else parameter.device
    log_probs = [torch.zeros(0, dtype=torch.float64)]
    for number, (x, classes) in enumerate(_batches(images, condition, batch_size)):
        if shared and number % distributed.world_size() != distributed.rank():
            log_probs.append(torch.zeros(len(x), dtype=torch.float64))
            continue
        x, classes = x.to(device), classes.to(device) if conditional and classes is not None else None
        with nullcontext() if seed is None else seeded(device, seed, number):
            log_probs.append(model.log_prob(x, condition=classes, **options).cpu().double())
    return distributed.merged(torch.cat(log_probs)) if shared else torch.cat(log_probs)


def _batches(images: Images, condition: Tensor | None, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images and, where there are any, their classes."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an int >= 1, got {batch_size!r}")
    if isinstance(images, Tensor):
        if condition is not None and len(condition) != len(images):
            raise ValueError(f"condition must hold {len(images)} classes, one an image, got {len(condition)}")
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            yield images[part], None if condition is None else condition[part]
        return
    if condition is not None:
        raise ValueError("condition is for a tensor of images: batches bring their classes with them")
    for batch in images:
        yield (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)


class Evaluation(NamedTuple):
    """Negative log-likelihood of a data set; every image counts alike, whatever the batches were.

    Attributes:
        nats: mean of -log p(x) over the images.
        bits_per_dim: nats / (C * H * W * ln 2).
        standard_error: of nats, from the spread over the images; NaN for a single image.
        images: their number.
        exact: False where log_prob is a lower bound (a VAE), so that nats and bits are at most these.
    """

    nats: float
    bits_per_dim: float
    standard_error: float
    images: int
    exact: bool

    def __str__(self) -> str:
        sign = "" if self.exact else "<= "
        return f"{sign}{self.nats:.2f} nats an image (standard error {self.standard_error:.2f}), " + (
            f"{sign}{self.bits_per_dim:.3f} bits/dim, {self.images} images"
        )


def evaluate(model: Any, images: Images, condition: Tensor | None = None, **options: Any) -> Evaluation:
    """The negative log-likelihood of a data set; arguments as in `log_likelihoods`. `model.shape` is its image's.

    Raises:
        ValueError: as in `log_likelihoods`, or there are no images.
    """
    nll = -log_likelihoods(model, images, condition, **options)
    if len(nll) == 0:
        raise ValueError("images must hold at least one image, got none")
    nats, error = nll.mean().item(), nll.std().item() / math.sqrt(len(nll)) if len(nll) > 1 else math.nan
    model = unwrap(model)
    return Evaluation(nats, bits_per_dim(nats, model.shape), error, len(nll), not isinstance(model, VAE))


# --- Bayes' rule


class ClassPosterior(NamedTuple):
    """log p(y | x) (N, n_classes), and log p(x) (N,) nats with the class summed out; float64 on the CPU."""

    log_probs: Tensor
    log_likelihood: Tensor

    @property
    def labels(self) -> Tensor:
        """The most probable class of each image, (N,) int64."""
        return self.log_probs.argmax(1)


def class_posterior(
    model: Any, images: Tensor, prior: Sequence[float] | Tensor | None = None, **options: Any
) -> ClassPosterior:
    """Classifies images by a class-conditional model: p(y | x) = p(x | y) p(y) / sum over y' of p(x | y') p(y').

    Args:
        model: with `n_classes`; each image is scored once for each class.
        images: integer levels (N, C, H, W).
        prior: p(y) of each class, summing to 1; None for equal ones.
        options: batch_size, seed and shared as in `log_likelihoods`, and options for `model.log_prob`.

    Raises:
        ValueError: the model is not class-conditional, or prior holds no such probabilities.
    """
    n_classes = getattr(model, "n_classes", None)
    if n_classes is None:
        raise ValueError("model must be class-conditional for Bayes' rule: build it with n_classes")
    p = torch.full((n_classes,), 1 / n_classes) if prior is None else torch.as_tensor(prior)
    p = p.double().cpu()
    if p.shape != (n_classes,) or not (p >= 0).all() or not math.isclose(p.sum(), 1, abs_tol=1e-4):
        raise ValueError(f"prior must hold {n_classes} probabilities that sum to 1, got {prior!r}")
    joint = torch.stack(
        [
            log_likelihoods(model, images, torch.full((len(images),), label), **options) + p[label].log()
            for label in range(n_classes)
        ],
        1,
    )
    evidence = joint.logsumexp(1)
    return ClassPosterior(joint - evidence.unsqueeze(1), evidence)


# --- outliers


def likelihood_ratio(log_prob: Tensor, background_log_prob: Tensor) -> Tensor:
    """Outlier score log p_background(x) - log p(x) (Ren et al. 2019, "Likelihood Ratios for Out-of-Distribution
    Detection", equation 6, negated), nats.

    The likelihood alone rewards simple images of any kind. A background model, trained on images spoilt by `perturb`,
    knows what is simple but not what is typical: their ratio keeps what only the full model explains.
    """
    if log_prob.shape != background_log_prob.shape:
        raise ValueError(
            f"background_log_prob must have the shape {tuple(log_prob.shape)} of log_prob, got "
            f"{tuple(background_log_prob.shape)}"
        )
    return background_log_prob - log_prob


def perturb(x: Tensor, levels: int, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Integer levels x, each replaced with probability `rate` by one drawn evenly from 0..levels - 1 (Ren et al. 2019,
    section 3.1); what a background model is trained on.

    Raises:
        ValueError: rate is not in [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate!r}")
    noise = torch.randint(levels, x.shape, generator=generator, device=x.device).to(x.dtype)
    chosen = torch.rand(x.shape, generator=generator, device=x.device) < rate
    return torch.where(chosen, noise, x)


def typicality(log_prob: Tensor, training_log_prob: Tensor, *, group: int = 1) -> Tensor:
    """Outlier score |mean of -log p(x) over a group - mean of -log p over the training images|, nats (Nalisnick et al.
    2019, "Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality", equation 5).

    Also inputs that are too likely are outliers: where the training data has most of its mass, -log p is close to
    its entropy.

    Args:
        log_prob: (N,) nats of the inputs; consecutive ones form groups.
        training_log_prob: nats of training images, any number.
        group: inputs judged together, M; a divisor of N.

    Returns:
        (N / group,).
    """
    if not isinstance(group, int) or group < 1 or log_prob.dim() != 1 or len(log_prob) % group:
        raise ValueError(f"group must be an int >= 1 that divides the {tuple(log_prob.shape)} inputs, got {group!r}")
    return (log_prob.view(-1, group).mean(1) - training_log_prob.mean()).abs()


def typicality_threshold(
    held_out_log_prob: Tensor,
    training_log_prob: Tensor,
    *,
    group: int = 1,
    false_alarms: float = 0.01,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> float:
    """The threshold that `typicality` of a group of inliers exceeds with probability `false_alarms`. It is estimated by
    the bootstrap: groups are drawn with replacement from held-out images (Nalisnick et al. 2019, algorithm 1)."""
    index = torch.randint(len(held_out_log_prob), (resamples * group,), generator=generator)
    scores = typicality(held_out_log_prob[index], training_log_prob, group=group)
    return rejection_threshold(scores, false_alarms)


def rejection_threshold(inlier_scores: Tensor, false_alarms: float = 0.05) -> float:
    """The least threshold that a new inlier's score exceeds with probability at most `false_alarms`, whatever the
    scores are, given held-out inliers' scores (N,) (split conformal prediction; infinite where N is too small).

    Raises:
        ValueError: false_alarms is not in (0, 1).
    """
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must be in (0, 1), got {false_alarms!r}")
    rank = math.ceil((len(inlier_scores) + 1) * (1 - false_alarms) - 1e-9)
    return math.inf if rank > len(inlier_scores) else inlier_scores.sort().values[rank - 1].item()


def auroc(inlier_scores: Tensor, outlier_scores: Tensor) -> float:
    """Probability that a random outlier scores higher than a random inlier, ties counting half: 0.5 is chance."""
    ordered = inlier_scores.sort().values
    below = torch.searchsorted(ordered, outlier_scores, right=False)
    up_to = torch.searchsorted(ordered, outlier_scores, right=True)
    return (below + up_to).double().mean().item() / (2 * len(ordered))
