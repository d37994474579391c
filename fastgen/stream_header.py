"""The header of a compressed stream (`fastgen.compression`): what the stream holds, and what is needed to decode it."""

import hashlib
import struct
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastgen._version import __version__

MAGIC = b"fastgenZ"
VERSION = 1
# Little-endian: MAGIC, VERSION, number of dimensions of an image, its three sizes, number of images, number of words,
# digests of model, condition and images, number of bytes of text that follow.
_FIXED = struct.Struct("<8sHH3IQQ16s16s16sH")
DIGEST = 16  # bytes


class Header(NamedTuple):
    """The header of a stream: its images, and the model and arithmetic that decode them.

    Attributes:
        shape: the shape of an image, one to three sizes.
        images: number of images.
        words: number of 32-bit words that follow the header.
        model_digest, condition_digest, images_digest: DIGEST bytes each, from `digest`.
        computed: the arithmetic that computed the model's output, as text; see `how_computed`.
    """

    shape: tuple[int, ...]
    images: int
    words: int
    model_digest: bytes
    condition_digest: bytes
    images_digest: bytes
    computed: str

    def stream(self, words: bytes) -> bytes:
        """The bytes of the whole stream: header, words, and the digest of both."""
        text = self.computed.encode()
        sizes = (*self.shape, 0, 0)[:3]
        digests = (self.model_digest, self.condition_digest, self.images_digest)
        fixed = _FIXED.pack(MAGIC, VERSION, len(self.shape), *sizes, self.images, self.words, *digests, len(text))
        body = fixed + text + words
        return body + digest(body)

    @classmethod
    def read(cls, data: Any) -> tuple["Header", np.ndarray]:
        """Checks a stream and returns its header and its words (uint32). Allocates nothing larger than the data.

        Raises:
            TypeError: data is not bytes.
            ValueError: data is not a stream of fastgen, of another version of the format, truncated or damaged.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data must be bytes, got {type(data).__name__}")
        data = bytes(data)
        if not data or not MAGIC.startswith(data[: len(MAGIC)]):
            raise ValueError(f"data: is foreign: a stream of fastgen.compress begins with {MAGIC!r}")
        if len(data) < _FIXED.size:
            raise ValueError(f"data: is truncated: {len(data)} bytes, and a header alone has {_FIXED.size}")
        _, number, dims, *sizes, images, words, weights, condition, images_digest, text = _FIXED.unpack_from(data)
        if number != VERSION:
            raise ValueError(f"data: is of version {number} of the format, this fastgen reads version {VERSION}")
        start = _FIXED.size + text
        end = start + 4 * words
        if len(data) < end + DIGEST:
            raise ValueError(f"data: is truncated: {len(data)} bytes of {end + DIGEST}")
        if digest(data[:end]) != data[end:]:
            raise ValueError("data: is damaged: its checksum does not match its content")
        computed = data[_FIXED.size : start].decode(errors="replace")
        header = cls(tuple(sizes[:dims]), images, words, weights, condition, images_digest, computed)
        return header, np.frombuffer(data, "<u4", words, start).astype(np.uint32)

    def check(self, here: "Header") -> None:
        """Raises ValueError if the model, condition and arithmetic that `here` describes cannot decode this stream."""
        if self.shape != here.shape:
            raise ValueError(f"data: holds images of the shape {self.shape}, the model's are {here.shape}")
        if self.model_digest != here.model_digest:
            raise ValueError("data: was compressed by another model, or with other weights")
        if self.computed != here.computed:
            raise ValueError(
                "data: was compressed with other arithmetic, which rounds otherwise: "
                f"it was computed by {self.computed}; here by {here.computed}"
            )
        if self.condition_digest != here.condition_digest:
            raise ValueError("data: was compressed with another condition (the classes of a class-conditional model)")


def how_computed(model: nn.Module, backend: str, batch: int) -> str:
    """One line that names everything, besides weights and input, on which the bits of a model's output depend."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    device = parameter.device.type
    name = torch.cuda.get_device_name(parameter.device) if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    cast = f" (autocast to {torch.get_autocast_dtype(device)})" if torch.is_autocast_enabled(device) else ""
    return (
        f"backend {backend}, {parameter.dtype}{cast}, batch {batch}, threads {torch.get_num_threads()}, {device} {name}"
        f", torch {torch.__version__}, constriction {version('constriction')}, fastgen {__version__}"
    )


def weights_digest(model: nn.Module, more: str) -> bytes:
    """The digest of all parameters and buffers with their names, and of the text `more`."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return digest(more.encode(), *(part for name, tensor in sorted(tensors) for part in (name.encode(), plain(tensor))))


def plain(leaf: Any) -> bytes:
    """The bytes of a tensor (dtype, shape and content), or of the `repr` of another value of a condition."""
    if not isinstance(leaf, Tensor):
        return repr(leaf).encode()
    contiguous = leaf.detach().cpu().clone(memory_format=torch.contiguous_format)
    content = contiguous.view(-1).view(torch.uint8).numpy().tobytes()
    return f"{leaf.dtype} {tuple(leaf.shape)}\n".encode() + content


def digest(*parts: bytes) -> bytes:
    """A hash of DIGEST bytes of the parts. Lengths are hashed too, so that ("a", "bc") and ("ab", "c") differ."""
    hasher = hashlib.blake2b(digest_size=DIGEST)
    for part in parts:
        hasher.update(struct.pack("<Q", len(part)))
        hasher.update(part)
    return hasher.digest()
