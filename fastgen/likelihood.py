"""Uses of a model's likelihood: bits/dim, classification by Bayes' rule, outlier scores.

A model here is any object with `log_prob(x, condition=None) -> (B,)` nats for integer levels x (B, C, H, W): every
model of `fastgen.models` except the autoencoder. Further options, such as the VAE's n_samples, are passed on to
`log_prob`. A higher outlier score always means that the input looks less like the training data.
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
    """nll / (C * H * W * ln 2).

    Args:
        nll: negative log-likelihood of an image in nats, a number or a tensor of any shape.
        shape: (C, H, W) of an image.
    """
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
        images: integer levels (N, C, H, W); or an iterable of batches, such as a DataLoader, each of which is images or
            a pair of images and classes. A class-conditional model uses the classes, others ignore them.
        condition: classes (N,), if images is a tensor.
        batch_size: number of images scored at a time, if images is a tensor.
        seed: seed of the random numbers of each batch (a VAE draws z); None uses torch's default generators.
        shared: True divides the batches among the processes of a job (`fastgen.distributed`). All processes must call
            with the same images, and all get all results.
        options: further arguments of `model.log_prob`.

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
    """Batches of images with their classes, or with None."""
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
        raise ValueError("condition is for a tensor of images: batches hold their own classes")
    for batch in images:
        yield (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)


class Evaluation(NamedTuple):
    """Negative log-likelihood of a data set, averaged over its images.

    Attributes:
        nats: mean of -log p(x) over the images.
        bits_per_dim: nats / (C * H * W * ln 2).
        standard_error: standard error of `nats`, from the spread over the images; NaN for a single image.
        images: number of images.
        exact: False for a VAE, whose log_prob is a lower bound: `nats` and `bits_per_dim` are then upper bounds.
    """

    nats: float
    bits_per_dim: float
    standard_error: float
    images: int
    exact: bool

    def __str__(self) -> str:
        sign = "" if self.exact else "<= "
        return f"{sign}{self.nats:.2f} nats per image (standard error {self.standard_error:.2f}), " + (
            f"{sign}{self.bits_per_dim:.3f} bits/dim, {self.images} images"
        )


def evaluate(model: Any, images: Images, condition: Tensor | None = None, **options: Any) -> Evaluation:
    """The negative log-likelihood of a data set. Arguments as in `log_likelihoods`; the model must also have `shape`,
    the (C, H, W) of its images.

    Raises:
        TypeError, ValueError: as in `log_likelihoods`; ValueError also if there are no images.
    """
    nll = -log_likelihoods(model, images, condition, **options)
    if len(nll) == 0:
        raise ValueError("images must hold at least one image, got none")
    nats, error = nll.mean().item(), nll.std().item() / math.sqrt(len(nll)) if len(nll) > 1 else math.nan
    model = unwrap(model)
    return Evaluation(nats, bits_per_dim(nats, model.shape), error, len(nll), not isinstance(model, VAE))


# --- Bayes' rule


class ClassPosterior(NamedTuple):
    """Class probabilities of N images by Bayes' rule, float64 on the CPU.

    Attributes:
        log_probs: log p(y | x), (N, n_classes).
        log_likelihood: log p(x) = log sum_y p(x | y) p(y), (N,) nats.
    """

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
        model: a model with `n_classes`. It scores each image once for each class.
        images: integer levels (N, C, H, W).
        prior: (n_classes,) probabilities p(y) that sum to 1; None for equal ones.
        options: batch_size, seed and shared as in `log_likelihoods`, and further arguments of `model.log_prob`.

    Raises:
        ValueError: the model is not class-conditional, or prior is not n_classes probabilities that sum to 1.
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
    """Outlier score log p_background(x) - log p(x) in nats (Ren et al. 2019, "Likelihood Ratios for Out-of-Distribution
    Detection", equation 6, negated).

    The likelihood alone is high for simple images of any kind. A background model, trained on images that `perturb` has
    spoilt, also assigns simple images a high likelihood, but has not learnt what is typical of the data. The difference
    keeps what only the full model explains.

    Args:
        log_prob: (N,) nats under the model.
        background_log_prob: (N,) nats under the background model.

    Raises:
        ValueError: the shapes differ.
    """
    if log_prob.shape != background_log_prob.shape:
        raise ValueError(
            f"background_log_prob must have the shape {tuple(log_prob.shape)} of log_prob, got "
            f"{tuple(background_log_prob.shape)}"
        )
    return background_log_prob - log_prob


def perturb(x: Tensor, levels: int, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Replaces each level, with probability `rate`, by one drawn uniformly from 0..levels - 1 (Ren et al. 2019, section
    3.1). A background model is trained on the result.

    Args:
        x: integer levels of any shape; the result has its shape and dtype.

    Raises:
        ValueError: rate is not in [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate!r}")
    noise = torch.randint(levels, x.shape, generator=generator, device=x.device).to(x.dtype)
    chosen = torch.rand(x.shape, generator=generator, device=x.device) < rate
    return torch.where(chosen, noise, x)


def typicality(log_prob: Tensor, training_log_prob: Tensor, *, group: int = 1) -> Tensor:
    """Outlier score |mean of -log p(x) over a group - mean of -log p over training images| in nats (Nalisnick et al.
    2019, "Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality", equation 5).

    Typical inputs have a -log p close to the entropy of the data. Inputs that are far more likely are outliers too.

    Args:
        log_prob: (N,) nats of the inputs; each `group` consecutive ones are judged together.
        training_log_prob: nats of any number of training images.
        group: number of inputs that are judged together; a divisor of N.

    Returns:
        (N / group,) nats.

    Raises:
        ValueError: log_prob is not (N,), or group is not a divisor of N.
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
    """The threshold that the `typicality` of a group of inliers exceeds with probability `false_alarms`, estimated by
    the bootstrap (Nalisnick et al. 2019, algorithm 1).

    Args:
        held_out_log_prob: (N,) nats of held-out images, from which groups are drawn with replacement.
        training_log_prob, group: as in `typicality`.
        resamples: number of groups that are drawn.
    """
    index = torch.randint(len(held_out_log_prob), (resamples * group,), generator=generator)
    scores = typicality(held_out_log_prob[index], training_log_prob, group=group)
    return rejection_threshold(scores, false_alarms)


def rejection_threshold(inlier_scores: Tensor, false_alarms: float = 0.05) -> float:
    """The smallest threshold that the score of a new inlier exceeds with probability at most `false_alarms`, for any
    distribution of scores (split conformal prediction). Infinite if there are too few scores.

    Args:
        inlier_scores: (N,) scores of held-out inliers.

    Raises:
        ValueError: false_alarms is not in (0, 1).
    """
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must be in (0, 1), got {false_alarms!r}")
    rank = math.ceil((len(inlier_scores) + 1) * (1 - false_alarms) - 1e-9)
    return math.inf if rank > len(inlier_scores) else inlier_scores.sort().values[rank - 1].item()


def auroc(inlier_scores: Tensor, outlier_scores: Tensor) -> float:
    """Probability that a random outlier scores higher than a random inlier, with ties counted half; 0.5 is chance.

    Raises:
        ValueError: there are no inliers or no outliers.
    """
    if not len(inlier_scores) or not len(outlier_scores):
        raise ValueError(
            f"inlier_scores and outlier_scores must not be empty, got {len(inlier_scores)} and {len(outlier_scores)}"
        )
    ordered = inlier_scores.sort().values
    below = torch.searchsorted(ordered, outlier_scores, right=False)
    up_to = torch.searchsorted(ordered, outlier_scores, right=True)
    return (below + up_to).double().mean().item() / (2 * len(ordered))
