"""The one way in which tests hold a sampler to the definition.

An engine that is wrong still gives the right images where a whole pass of the model puts them right. So every batch is
looked at by such a pass (`verify="always"`), which must find nothing to put right.
"""

import contextlib
import warnings

import torch

from fastgen import accelerate


@contextlib.contextmanager
def _no_warning():
    """Each is an error, but for what NumPy says of the interpreter of Triton 3.6."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
        yield


def pair(model, shape, backend="eager", verify="always", **arguments):
    """A sampler by the engine that is to be tested, and the definition; no fallback, no warning."""
    with _no_warning():
        fast = accelerate(model, shape, backend=backend, verify=verify, **arguments)
        naive = accelerate(model, shape, backend="naive", **arguments)
    assert f"{backend}:" in fast.explain() or backend == "auto"
    return fast, naive


def assert_exact(fast, naive, n, error=2e-5, passes=1, **options):
    """Draws by both and returns the images. They are the same; the one whole pass that looked has found nothing wrong,
    and no parameter further from the model's than `error`; nobody was warned.

    Args:
        passes: how many there must have been; None where the margin decides, at most one then.
    """
    with _no_warning():
        images = fast.sample(n, **options)
        expected = naive.sample(n, **options)
    if options.get("return_log_prob"):
        (images, nats), (expected, expected_nats) = images, expected
        torch.testing.assert_close(nats, expected_nats, rtol=1e-4, atol=1e-4)
    assert torch.equal(images, expected)
    stats = fast.stats
    assert stats.redrawn == 0
    assert stats.passes == passes if passes is not None else stats.passes <= 1
    assert stats.passes == 0 or stats.error < error
    return images
