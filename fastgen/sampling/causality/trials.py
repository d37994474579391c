"""Takes a `Network`; gives the dependences that changing its input shows, for what ready times cannot tell.

A trial leads from one image to another, a level at a time, and notes which outputs move with each level. Levels are
changed in each image by itself (a star around it) or one after the other (a walk), so that they are seen among many
others; images are random, blank, full, or of extreme levels in different proportions, which wake units that random
images leave asleep. What no trial has shown may still be so: trials prove that a model leaks, never that it does not.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastgen.sampling.trace.network import Network

NOISE_FLOOR = 1e-6  # of the largest output: what a change of input may move by rounding alone
BATCH = 64
MOST_TRIALS, LEAST_TRIALS = 32, 6
CHANGES = 4096  # levels changed in all trials together, where the fewest trials do not need more


def dependences(network: Network) -> tuple[Tensor, int]:
    """Which outputs were seen to change with which levels, bool (C*H*W, *output of one image), and in how many trials.

    Raises:
        ValueError: the outputs for one and the same image differ, so that nothing can be seen.
    """
    count = network.samples[0].numel()
    trials = max(LEAST_TRIALS, min(MOST_TRIALS, CHANGES // count))
    found: Tensor | None = None
    for start, end, walk in _trials(network, trials):
        moved = changes(network.run, start, end, walk)
        found = moved if found is None else found | moved
    assert found is not None
    return found, trials


def dependences_of_ends(network: Network) -> Tensor:
    """As `dependences`, seen in one trial of the first and the last level alone: enough where all depends on all, as
    with a normalization in training mode."""
    start, end = network.samples[:1], network.samples[1:2]
    ends = torch.tensor([0, start.numel() - 1])
    return changes(network.run, start, end, None, ends)


def _trials(network: Network, trials: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """First and last image (1, C, H, W) of each, and the order in which a walk changes the levels; None for a star."""
    generator = torch.Generator().manual_seed(1)
    least, most = network.extremes
    shape = network.samples[:1].shape
    nothing = torch.zeros_like(network.samples[:1])
    blank, full = nothing + least, nothing + (most.to(nothing.device) if isinstance(most, Tensor) else most)
    numbers = torch.arange(blank.numel())
    for k in range(trials):
        by_chance = torch.randperm(len(numbers), generator=generator)
        if k < 4:
            images = (network.samples[k : k + 1], network.samples[k + 1 : k + 2])
            yield *images, [None, numbers, by_chance, numbers.flip(0)][k]
        elif k < 8:
            images = (blank, full) if k % 2 else (full, blank)
            yield *images, [None, None, numbers, by_chance][k - 4]
        else:
            part = (0.1, 0.5, 0.9)[k % 3]
            high = (torch.rand(shape, generator=generator) < part).to(blank.device)
            start = torch.where(high, full, blank)
            yield start, torch.where(high, blank, full), None if k % 2 else by_chance


def changes(
    run: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, walk: Tensor | None, some: Tensor | None = None
) -> Tensor:
    """Which outputs change with which levels: bool (C*H*W, *output of one image).

    Where an image's output depends on what else is in its batch (statistics of a batch), each changed image is run in
    a batch with itself alone.

    Args:
        run: images -> outputs.
        start, end: images (1, C, H, W).
        walk: the numbers of the levels in the order in which they change one after the other; None: each by itself.
        some: the numbers of the levels that change by themselves; None: all.
    """
    other = start + 0.5 if start.is_floating_point() else torch.where(start == 0, 1, start - 1)
    end = torch.where(end == start, other, end)  # every level changes
    base, ends = run(torch.cat((start, start)))[:1], run(torch.cat((start, end)))
    alone = not torch.allclose(base, ends[:1], rtol=1e-5, atol=1e-6, equal_nan=True)
    finite = ends[ends.isfinite()].abs()
    scale = finite.max().clamp(min=1e-30) if len(finite) else torch.ones(())
    order = walk if walk is not None else torch.arange(start.numel()) if some is None else some
    found = torch.zeros((start.numel(), *base.shape[1:]), dtype=torch.bool)
    flat, changed = start.reshape(1, -1), end.reshape(-1)
    for numbers in order.split(1 if alone else BATCH):
        batch = flat.repeat(1 + len(numbers), 1)  # the unchanged image goes along: all are computed in the same way
        for row, number in enumerate(numbers.tolist(), 1):
            rows = slice(row, None if walk is not None else row + 1)
            batch[rows, number] = changed[number]
        images = batch.view(-1, *start.shape[1:])
        pairs = (torch.cat((image, image)) for image in images.split(1))
        outputs = torch.cat([run(pair)[:1] for pair in pairs]) if alone else run(images)
        before = outputs[:1] if walk is None else outputs[:-1]
        moved = (outputs[1:] - before).abs() > NOISE_FLOOR * scale
        found[numbers] = (moved | (outputs[1:].isnan() != before.isnan())).cpu()
        flat = flat if walk is None else batch[-1:]
    return found
