"""Scores of data sets; Bayes' rule compared with enumerated models; outlier scores compared with known values."""

import itertools
import math

import pytest
import torch
from torch import nn

from fastgen import likelihood
from fastgen.likelihood import evaluate, log_likelihoods
from fastgen.models import VAE, GatedPixelCNN, PixelCNN


class Table:
    """p(x | y) as a table over the 9 images of two pixels of three levels."""

    shape = (1, 1, 2)

    def __init__(self, n_classes=None):
        self.n_classes = n_classes
        self.table = torch.rand(n_classes or 1, 3, 3, dtype=torch.float64)
        self.table /= self.table.sum((1, 2), keepdim=True)

    def log_prob(self, x, condition=None):
        assert (condition is None) == (self.n_classes is None)
        rows = torch.zeros(len(x), dtype=torch.long) if condition is None else condition
        return self.table[rows, x[:, 0, 0, 0], x[:, 0, 0, 1]].log()


EVERY = torch.tensor(list(itertools.product(range(3), repeat=2))).view(9, 1, 1, 2)


def test_bits_per_dim():
    assert likelihood.bits_per_dim(math.log(256) * 12, (3, 2, 2)) == pytest.approx(8)
    assert torch.equal(likelihood.bits_per_dim(torch.tensor([0.0]), (1, 1, 1)), torch.tensor([0.0]))


# --- data sets


@pytest.mark.parametrize("n_classes", [None, 4])
def test_every_image_counts_once_whatever_the_batches(n_classes):
    model = Table(n_classes)
    labels = torch.randint(n_classes or 1, (9,))
    condition = labels if n_classes else None
    truth = model.log_prob(EVERY, condition)
    pairs = list(zip(EVERY.split(4), labels.split(4), strict=True))
    for found in (
        likelihood.log_likelihoods(model, EVERY, condition),
        likelihood.log_likelihoods(model, EVERY, condition, batch_size=2),
        likelihood.log_likelihoods(model, pairs),
        likelihood.log_likelihoods(model, torch.utils.data.DataLoader(list(zip(EVERY, labels, strict=True)), 5)),
    ):
        torch.testing.assert_close(found, truth)
    result = likelihood.evaluate(model, EVERY, condition, batch_size=2)
    assert result.nats == pytest.approx(-truth.mean().item()) and result.images == 9 and result.exact
    assert result.bits_per_dim == pytest.approx(result.nats / (2 * math.log(2)))
    assert result.standard_error == pytest.approx(truth.std().item() / 3)
    assert "<=" not in str(result)


def test_batches_without_classes_and_no_images():
    model = Table()
    torch.testing.assert_close(likelihood.log_likelihoods(model, EVERY.split(4)), model.log_prob(EVERY))
    torch.testing.assert_close(likelihood.log_likelihoods(model, [(EVERY,)]), model.log_prob(EVERY))
    assert likelihood.log_likelihoods(model, EVERY[:0]).shape == (0,)
    assert math.isnan(likelihood.evaluate(model, EVERY[:1]).standard_error)


def test_a_vae_is_scored_by_a_bound():
    model = VAE((1, 3, 3), 2, channels=4).eval()
    x = torch.randint(2, (5, 1, 3, 3))
    torch.manual_seed(0)
    found = likelihood.evaluate(model, x, n_samples=7)
    torch.manual_seed(0)
    assert found.nats == pytest.approx(-model.log_prob(x, 7).mean().item())
    assert not found.exact and str(found).startswith("<= ")


# --- Bayes' rule


@pytest.mark.parametrize("prior", [None, (0.7, 0.2, 0.1), (0.0, 0.5, 0.5)])
def test_bayes_rule_on_a_table(prior):
    model = Table(3)
    found = likelihood.class_posterior(model, EVERY, prior, batch_size=4)
    joint = model.table.view(3, 9) * torch.tensor(prior or [1 / 3] * 3).view(3, 1)
    torch.testing.assert_close(found.log_probs.exp(), (joint / joint.sum(0)).T)
    torch.testing.assert_close(found.log_likelihood.exp(), joint.sum(0))
    assert torch.equal(found.labels, joint.argmax(0))
    torch.testing.assert_close(found.log_likelihood.exp().sum().item(), 1.0)


def test_bayes_rule_of_a_pixelcnn_is_the_frequency_among_enumerated_pairs():
    """Over all images and classes: p(y | x) p(x) is p(x | y) p(y), and its sums over images are the prior."""
    model = GatedPixelCNN((1, 1, 2), 3, channels=4, layers=2, n_classes=2).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "condition" in name:
                parameter.mul_(20)
    prior = torch.tensor([0.3, 0.7])
    found = likelihood.class_posterior(model, EVERY, prior)
    joint = found.log_probs.exp() * found.log_likelihood.exp().unsqueeze(1)
    torch.testing.assert_close(joint.sum(0), prior.double())
    for label in range(2):
        of_class = model.log_prob(EVERY, torch.full((9,), label)).exp()
        torch.testing.assert_close(joint[:, label], of_class.detach() * prior[label])
    assert (found.log_probs[:, 0] - prior.log()[0]).abs().max() > 0.05


# --- outliers


def test_typicality_is_distance_from_the_entropy():
    log_prob = torch.tensor([-3.0, -5.0, -9.0, -1.0])
    training = torch.tensor([-4.0, -6.0])
    torch.testing.assert_close(likelihood.typicality(log_prob, training), torch.tensor([2.0, 0.0, 4.0, 4.0]))
    torch.testing.assert_close(likelihood.typicality(log_prob, training, group=2), torch.tensor([1.0, 0.0]))


def test_a_typicality_threshold_is_exceeded_as_often_as_asked():
    generator = torch.Generator().manual_seed(1)
    training, held_out, new = (torch.randn(20_000, generator=generator, dtype=torch.float64) - 7 for _ in range(3))
    for group in (1, 4):
        threshold = likelihood.typicality_threshold(
            held_out, training, group=group, false_alarms=0.1, resamples=20_000, generator=generator
        )
        assert threshold == pytest.approx(1.645 / math.sqrt(group), rel=0.05)
        rejected = likelihood.typicality(new, training, group=group) > threshold
        assert abs(rejected.double().mean() - 0.1) < 0.02
    # What is a little too likely as a single image stands out in a group.
    shifted = new + 1
    assert (likelihood.typicality(shifted, training, group=4) > threshold).double().mean() > 0.5


def test_the_ratio_finds_what_the_likelihood_alone_misses():
    """Simple images (level 0 everywhere) are likely under both models; the ratio separates them from the data."""
    levels = 4
    patterns = torch.tensor([[0, 3, 0, 3], [3, 0, 3, 0]])

    def model(pixels, pattern):
        """Log-likelihoods of a mixture of both patterns seen through noise, and of a background without pattern."""
        keep = torch.full((2, 4, levels), 0.1)
        keep.scatter_(2, patterns.unsqueeze(2), 0.7)
        background = torch.tensor([0.48, 0.02, 0.02, 0.48])
        mixture = keep.log()[:, torch.arange(4), pixels].sum(-1).logsumexp(0) - math.log(2)
        return mixture if pattern else background.log()[pixels].sum(-1)

    inliers, flat = torch.tensor([[0, 3, 1, 3], [3, 0, 3, 2]]), torch.zeros(1, 4, dtype=torch.long)
    ratio = [likelihood.likelihood_ratio(model(x, True), model(x, False)) for x in (inliers, flat)]
    assert model(flat, False).item() > model(inliers, False).max()
    assert ratio[1].min() > ratio[0].max()


def test_perturbed_images_change_at_the_rate_asked_for():
    x = torch.full((200, 1, 10, 10), 3, dtype=torch.uint8)
    changed = likelihood.perturb(x, 5, 0.25, generator=torch.Generator().manual_seed(0))
    assert changed.dtype == torch.uint8 and changed.max() == 4
    assert abs((changed != 3).double().mean() - 0.25 * 4 / 5) < 0.01
    assert torch.equal(likelihood.perturb(x, 5, 0.0), x)


def test_a_threshold_bounds_false_alarms():
    scores = torch.arange(1.0, 20.0)
    assert likelihood.rejection_threshold(scores, 0.05) == 19
    assert likelihood.rejection_threshold(scores, 0.5) == 10
    assert likelihood.rejection_threshold(scores[:5], 0.05) == math.inf
    generator = torch.Generator().manual_seed(2)
    draws = torch.rand(4000, 20, generator=generator)
    alarms = [row[19] > likelihood.rejection_threshold(row[:19], 0.1) for row in draws]
    assert abs(torch.stack(alarms).double().mean() - 0.1) < 0.02


def test_auroc_counts_pairs():
    inliers, outliers = torch.randint(6, (30,)), torch.randint(3, 9, (40,))
    difference = outliers.view(-1, 1) - inliers
    truth = ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()
    assert likelihood.auroc(inliers, outliers) == pytest.approx(truth)
    assert likelihood.auroc(torch.zeros(3), torch.ones(2)) == 1


class Training(Table, nn.Module):
    def __init__(self):
        nn.Module.__init__(self)
        Table.__init__(self)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: likelihood.log_likelihoods(Training(), EVERY), "model.eval"),
        (lambda: likelihood.log_likelihoods(Table(2), EVERY, torch.zeros(3, dtype=torch.long)), "9 classes"),
        (lambda: likelihood.log_likelihoods(Table(2), EVERY.split(3), torch.zeros(9)), "condition is for a tensor"),
        (lambda: likelihood.log_likelihoods(Table(), EVERY, batch_size=0), "batch_size"),
        (lambda: likelihood.evaluate(Table(), EVERY[:0]), "at least one image"),
        (lambda: likelihood.class_posterior(Table(), EVERY), "class-conditional"),
        (lambda: likelihood.class_posterior(Table(2), EVERY, [0.5, 0.6]), "sum to 1"),
        (lambda: likelihood.class_posterior(Table(2), EVERY, [1.0]), "2 probabilities"),
        (lambda: likelihood.class_posterior(Table(2), EVERY, [1.5, -0.5]), "2 probabilities"),
        (lambda: likelihood.likelihood_ratio(torch.zeros(2), torch.zeros(3)), "background_log_prob"),
        (lambda: likelihood.perturb(EVERY, 3, 1.5), "rate"),
        (lambda: likelihood.typicality(torch.zeros(5), torch.zeros(5), group=2), "group"),
        (lambda: likelihood.rejection_threshold(torch.zeros(5), 0.0), "false_alarms"),
        (lambda: likelihood.auroc(torch.zeros(0), torch.zeros(5)), "must not be empty, got 0 and 5"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_the_noise_of_a_seed_belongs_to_the_batch():
    model = VAE((1, 4, 4), 2, likelihood="categorical", levels=3, channels=4, hidden=8).eval()
    x = torch.randint(3, (5, 1, 4, 4))
    before = torch.get_rng_state()
    first, second, other = (
        log_likelihoods(model, x, batch_size=2, n_samples=3, seed=s, shared=True) for s in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_wrappers_are_taken_off_and_what_has_no_likelihood_is_named():
    model = PixelCNN((1, 4, 4), 3, channels=4, layers=1).eval()
    x = torch.randint(3, (5, 1, 4, 4))
    wrapped = torch.nn.DataParallel(torch.compile(model, backend="eager")).eval()
    assert torch.equal(log_likelihoods(wrapped, x), log_likelihoods(model, x))
    assert evaluate(wrapped, x) == evaluate(model, x)
    with pytest.raises(TypeError, match=r"model must have log_prob.*Linear"):
        log_likelihoods(torch.nn.Linear(1, 1).eval(), x)
