"""fastgen compress, decompress."""

import argparse
import io
import math
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli.common import add_data, add_run, device_of, load_run_data, positive_int
from fastgen.cli.pictures import check_target, write_images

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = b"fastgenC"  # begins a file of a class-conditional model: then their number, the classes, the stream
_COUNT = struct.Struct("<8sQ")
PICTURES = (1, 3)  # channels that picture files have


def add(commands: Any) -> None:
    compress = commands.add_parser(
        "compress",
        help="compress images losslessly by an autoregressive model",
        description="Writes images as the bits that the model's probabilities leave to be said, decodes them again to "
        "make sure, and compares the size with PNG, lossless WebP and, where pillow-jxl-plugin is installed, JPEG XL. "
        "The file is decoded by the same model, computed in the same way (backend, threads, versions).",
    )
    add_run(compress, run_compress)
    add_data(compress)
    compress.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    compress.add_argument("--n", "--count", type=positive_int, help="the first N images (default: all)")
    compress.add_needed("--out", metavar="FILE", help="the file to write")
    decompress = commands.add_parser(
        "decompress",
        help="the images of a file that compress wrote",
        description="Decodes a file that `fastgen compress` wrote with the same RUN to the very images, or says why it "
        "cannot.",
    )
    add_run(decompress, run_decompress)
    decompress.add_argument("file", metavar="FILE", help="what compress wrote")
    decompress.add_needed("--out", metavar="FOLDER", help="a folder for one PNG an image, an .npz, or a .png (a grid)")


def run_compress(arguments: argparse.Namespace) -> int:
    import torch

    from fastgen import files, likelihood

    model = _model(arguments)
    path = Path(arguments.out)
    if path.is_dir():
        raise ValueError(f"--out {path}: is a folder, expected the name of a file")
    files.make_folder(path.parent)
    dataset = load_run_data(arguments, model)
    split = getattr(dataset, arguments.split)
    if arguments.n is not None:
        if arguments.n > len(split):
            raise ValueError(f"--n {arguments.n}: {dataset.name} has {len(split)} {arguments.split} images")
        split = split[: arguments.n]
    images, classes = split.images.long(), None if model.n_classes is None else split.labels
    stream, there = _timed("compress", model, images, classes)
    decoded, back = _timed("decompress", model, stream, classes)
    if not torch.equal(decoded, images):
        raise RuntimeError("the images that came back are not those that were compressed: this is a bug")
    prefix = b"" if classes is None else _with_classes(classes, model.n_classes)
    files.write_atomically({path: prefix + stream})
    bits = float(-likelihood.log_likelihoods(model, images, classes).sum()) / math.log(2)
    size = "x".join(map(str, dataset.shape))
    print(f"{len(images)} {arguments.split} images of {dataset.name}, {size} with {dataset.levels} levels, in {path}")
    if prefix:
        print(f"before the stream stand the classes that the model needs, {len(prefix)} bytes")
    rows = {
        "the model's -log2 p(x)": bits / 8,
        "fastgen (decoded again: identical)": len(stream),
        **other_codecs(images, dataset.levels),
    }
    print(f"{'':38} {'bytes':>12} {'bits/dim':>9}")
    for name, count in rows.items():
        print(f"{name:38} {count:12,.0f} {8 * count / images.numel():9.3f}")
    naive = 1 / (images[0].numel() * _seconds_of_a_pass(model, images, classes))
    print(
        f"images a second: {len(images) / there:.1f} compressed (the model's analysis is part of it), "
        f"{len(images) / back:.1f} decoded; the naive loop, a whole pass of the model for each of {images[0].numel()} "
        f"levels, would decode {naive:.3g} (computed from the time of one pass)"
    )
    return 0


def run_decompress(arguments: argparse.Namespace) -> int:
    model = _model(arguments)
    target = check_target(arguments.out)
    if model.levels > 256 and target.suffix.lower() != ".npz":
        raise ValueError(f"--out {arguments.out}: images of {model.levels} levels fit into no PNG here, take NAME.npz")
    data, classes = Path(arguments.file).read_bytes(), None
    try:
        if model.n_classes is not None:
            classes, data = _without_classes(data, model.n_classes)
        images, seconds = _timed("decompress", model, data, classes)
        if len(images) == 0:
            raise ValueError("data: holds no images")
    except ValueError as error:
        raise ValueError(f"{arguments.file}: {str(error).removeprefix('data: ')}") from error
    said = write_images(images, model.levels, target, columns=max(1, round(len(images) ** 0.5)), labels=classes)
    print(f"{len(images)} images in {said}, {len(images) / seconds:.1f} a second")
    return 0


def _model(arguments: argparse.Namespace) -> Any:
    from fastgen import checkpoint
    from fastgen.models.autoregressive import AutoregressiveModel

    device = device_of(arguments)
    model = checkpoint.load(arguments.folder).to(device)
    if not isinstance(model, AutoregressiveModel):
        raise ValueError(f"{arguments.folder}: a {type(model).__name__} has no exact likelihood to compress images by")
    return model


def _timed(name: str, model: Any, given: Any, classes: "Tensor | None") -> tuple[Any, float]:
    import fastgen

    start = time.perf_counter()
    try:
        result = getattr(fastgen, name)(model, given, condition=classes)
    except ImportError as error:
        raise ValueError(str(error)) from error
    return result, time.perf_counter() - start


def _seconds_of_a_pass(model: Any, images: "Tensor", classes: "Tensor | None") -> float:
    """Seconds an image of one pass of the model over as many images as run well together."""
    import torch

    device = next(model.parameters()).device
    images, classes = images[:64].to(device), None if classes is None else classes[:64].to(device)
    seconds = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            model(images, classes).sum().item()
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)[1] / len(images)


def _class_type(n_classes: int) -> str:
    return "<u1" if n_classes <= 2**8 else "<u4"


def _with_classes(classes: "Tensor", n_classes: int) -> bytes:
    return _COUNT.pack(CLASSES, len(classes)) + classes.numpy().astype(_class_type(n_classes)).tobytes()


def _without_classes(data: bytes, n_classes: int) -> "tuple[Tensor, bytes]":
    """The classes before a stream, and the stream. Raises ValueError."""
    import numpy as np
    import torch

    kind = _class_type(n_classes)
    if not data.startswith(CLASSES) or len(data) < _COUNT.size:
        raise ValueError("data: is foreign: no file of a class-conditional model begins so")
    count = _COUNT.unpack_from(data)[1]
    end = _COUNT.size + count * np.dtype(kind).itemsize
    if len(data) < end:
        raise ValueError(f"data: is truncated: {len(data)} bytes, and its classes alone have {end}")
    classes = torch.from_numpy(np.frombuffer(data, kind, count, _COUNT.size).astype(np.int64))
    return classes, data[end:]


def other_codecs(images: "Tensor", levels: int) -> dict[str, int]:
    """Bytes that other lossless codecs take for images (n, C, H, W): a file an image, and one picture of all. None for
    what they have no pixels for."""
    import numpy as np
    from PIL import Image, features

    if images.shape[1] not in PICTURES or levels > 256:
        return {}
    options: dict[str, dict[str, Any]] = {"PNG": {"optimize": True}}
    if features.check("webp"):
        options["WebP"] = {"lossless": True, "quality": 100, "method": 6, "exact": True}
    try:
        import pillow_jxl  # noqa: F401 (gives Pillow the format)
    except ImportError:
        pass
    else:
        options["JXL"] = {"lossless": True, "effort": 9}
    pixels = images.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    columns = math.ceil(math.sqrt(len(pixels)))
    rest = np.zeros((-len(pixels) % columns, *pixels.shape[1:]), np.uint8)
    rows = np.concatenate((pixels, rest)).reshape(-1, columns, *pixels.shape[1:])
    sheet = rows.transpose(0, 2, 1, 3, 4).reshape(-1, columns * pixels.shape[2], pixels.shape[3])

    def size(array: "np.ndarray", name: str) -> int:
        buffer = io.BytesIO()
        image = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
        image.save(buffer, name, **options[name])
        return len(buffer.getvalue())

    names = {"PNG": "PNG, optimized", "WebP": "WebP, lossless", "JXL": "JPEG XL, lossless"}
    sizes = {}
    for name in options:
        sizes[f"{names[name]}, a file an image"] = sum(size(image, name) for image in pixels)
        sizes[f"{names[name]}, one picture"] = size(sheet, name)
    return sizes
