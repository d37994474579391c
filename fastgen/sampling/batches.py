"""Takes a request for many images; gives those of its parts, each of a size that runs well and fits into memory."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastgen.sampling.request import Backend, SampleRequest, SampleResult


class Batches:
    """Attributes:
    most: images at once that memory has turned out to hold; None: no limit was met yet.
    """

    most: int | None = None

    def run(
        self,
        backend: Backend,
        whole: SampleRequest,
        batch_size: int | None,
        progress: bool,
        calling: Callable[[], AbstractContextManager[Any]],
    ) -> list[SampleResult]:
        """Draws all images of a request, in parts.

        Args:
            batch_size: most images at once, None for no other limit than memory's and the backend's.
            progress: whether to show a bar.
            calling: makes the context in which the backend draws a part.

        Raises:
            FloatingPointError: the model's output at a draw was NaN.
        """
        from tqdm.auto import tqdm

        draws = math.prod(whole.shape)
        parts: list[SampleResult] = []
        start, most = 0, min(size for size in (whole.n, batch_size, self.most, backend.most) if size is not None)
        most = -(-whole.n // -(-whole.n // most))  # parts of about one size
        with tqdm(total=whole.n * draws, unit="draw", disable=not progress) as bar:

            def advance(images: int, done: int) -> None:
                bar.update(images * done)

            while start < whole.n:
                stop = min(start + most, whole.n)
                size = stop - start
                try:
                    with calling():
                        told = partial(advance, size) if progress else None
                        part = backend.run(replace(whole.of(slice(start, stop)), progress=told))
                except RuntimeError as error:
                    full = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
                    if size == 1 or not full:
                        raise
                else:
                    if bool(part.bad):
                        raise FloatingPointError(
                            "the model's output is NaN at a pixel that was to be drawn, or a value is infinite"
                        )
                    parts.append(part)
                    start = stop
                    continue
                # Out of the handler, whose traceback would keep the memory of the failed batch.
                self.most = most = size // 2
                bar.update(start * draws - bar.n)
                torch.cuda.empty_cache()
        return parts
