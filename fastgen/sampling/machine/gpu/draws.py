"""The tables of a request's draws for the step machine of GPUs."""

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.distributions import Bernoulli, Categorical, LogisticMixture
from fastgen.kernels.sampler import words
from fastgen.sampling.request import SampleRequest

KINDS = {Categorical: words.CATEGORICAL, Bernoulli: words.BERNOULLI, LogisticMixture: words.MIXTURE}


class Draws:
    """Attributes:
    code, places: tables on the device.
    noise, known, mask: what they speak of; of no meaning where nothing is known.
    bad: int32 (1,), not 0 once a parameter was NaN.
    """

    def __init__(
        self,
        request: SampleRequest,
        params: Tensor,
        levels: Tensor,
        order: Sequence[tuple[int, int, int]],
        whole_pixels: bool,
    ) -> None:
        distribution: Any = request.distribution
        device = params.device
        code = [0] * words.DRAWS_WORDS.value
        code[words.KIND.value] = KINDS[type(distribution)].value
        code[words.CHANNELS.value] = levels.shape[1] if whole_pixels else 1
        code[words.TEMPERATURE.value] = _bits(distribution.temperature)
        count = parameters = 1
        if isinstance(distribution, Categorical):
            count = parameters = distribution.levels
            if distribution.temperature > 0 and (distribution.top_k, distribution.top_p) != (None, None):
                code[words.TOP_K.value] = count if distribution.top_k is None else distribution.top_k
                code[words.TOP_P.value] = _bits(2.0 if distribution.top_p is None else distribution.top_p)
            params = distribution.logits(params).transpose(1, 2)  # (n, C, K, H, W)
        elif isinstance(distribution, Bernoulli):
            params = params.unsqueeze(2)
        else:
            count, parameters = distribution.n_mix, params.shape[1]
            params = params.unsqueeze(1)
        code[words.LEVELS.value], code[words.PARAMETERS.value] = count, parameters
        self.noise = request.noise
        self.known = torch.zeros(1, dtype=torch.int64, device=device)
        self.mask = torch.zeros(1, dtype=torch.uint8, device=device)
        self.bad = torch.zeros(1, dtype=torch.int32, device=device)
        code[words.PARAMS_IMAGE.value : words.PARAMS_LEVEL.value + 1] = params.stride()[:3]
        code[words.DRAWN_IMAGE.value : words.DRAWN_CHANNEL.value + 1] = levels.stride()[:2]
        code[words.NOISE_IMAGE.value : words.NOISE_CHANNEL.value + 1] = self.noise.stride()[:2]
        index = torch.tensor(order)
        channel, rows, columns = index.unbind(1)
        if whole_pixels:
            channel = torch.zeros_like(channel)
        places = torch.zeros((len(index), words.PLACE_WORDS.value), dtype=torch.int64)
        places[:, words.FIRST_CHANNEL.value] = channel

        def put(word: Any, tensor: Tensor, start: int = 0) -> None:
            places[:, word.value] = start + rows * tensor.stride(-2) + columns * tensor.stride(-1)

        put(words.PARAMS_AT, params, int(params.storage_offset()))
        put(words.DRAWN_AT, levels, int(levels.storage_offset()))
        put(words.NOISE_AT, self.noise)
        if request.known is not None and request.known_mask is not None:
            self.known, self.mask = request.known, request.known_mask.view(torch.uint8)
            code[words.HAS_KNOWN.value] = 1
            code[words.KNOWN_IMAGE.value : words.KNOWN_CHANNEL.value + 1] = self.known.stride()[:2]
            code[words.MASK_IMAGE.value : words.MASK_CHANNEL.value + 1] = self.mask.stride()[:2]
            put(words.KNOWN_AT, self.known)
            put(words.MASK_AT, self.mask)
        self.code, self.places = torch.tensor(code).to(device), places.to(device)

    def read(self) -> tuple[Tensor, ...]:
        """In the order of the kernel's arguments."""
        return self.code, self.places, self.noise, self.known, self.mask, self.bad


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def error_of_float32_draws(distribution: Any) -> float:
    """What rounding does to a cumulative probability at most, or to a logistic, in the kernel's float32: about 64 times
    a unit in the last place (a share rounds as its logarithm does, sums of a block of 256 levels as a tree of them),
    and one more for each further block."""
    return (64 + getattr(distribution, "levels", 0) / 256) * 2.0**-24


def unknown_draws(request: SampleRequest, params: Tensor, arena: Tensor, most: int) -> str | None:
    """What the machine cannot draw of a request, None where it can; most: levels with top_k or top_p."""
    distribution: Any = request.distribution
    if type(distribution) not in KINDS:
        return f"distribution {type(distribution).__name__}"
    options = (getattr(distribution, "top_k", None), getattr(distribution, "top_p", None))
    if options != (None, None) and distribution.levels > most:
        return f"top_k and top_p of more than {most} levels"
    if request.noise.dtype != torch.float32:
        return f"noise of {request.noise.dtype}"
    if params.dtype != torch.float32 or params.untyped_storage().data_ptr() != arena.untyped_storage().data_ptr():
        return "an output that no step computes in float32"
    return None
