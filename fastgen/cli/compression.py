"""fastgen compress, decompress."""

import argparse
import io
import math
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli.common import add_data, add_run, add_split, device_of, load_run_data, positive_int
from fastgen.cli.pictures import check_target, write_images

if TYPE_CHECKING:
    from torch import Tensor

# A file of a class-conditional model starts with CLASSES and the number of images; then come their classes, and the
# stream of fastgen.compress.
CLASSES = b"fastgenC"
_PREFIX = struct.Struct("<8sQ")
PICTURES = (1, 3)  # numbers of channels that picture files can have


def add(commands: Any) -> None:
    compress = commands.add_parser(
        "compress",
        help="compress images losslessly with an autoregressive model",
        description="Compresses images to about -log2 p(x) bits under the model, decodes them again as a check, and "
        "compares the size with PNG, lossless WebP and, if pillow-jxl-plugin is installed, JPEG XL. Decoding takes the "
        "same model, computed in the same way (backend, threads, versions).",
    )
    add_run(compress, run_compress)
    add_data(compress)
    add_split(compress)
    compress.add_argument("--n", "--count", type=positive_int, help="number of images, from the first (default: all)")
    compress.add_required("--out", metavar="FILE", help="the file to write")
    decompress = commands.add_parser(
        "decompress",
        help="decode a file that compress wrote",
        description="Decodes a file that `fastgen compress` wrote with the same RUN. The images are exactly those that "
        "were compressed; otherwise the command fails and says why.",
    )
    add_run(decompress, run_decompress)
    decompress.add_argument("file", metavar="FILE", help="a file that compress wrote")
    decompress.add_required(
        "--out", metavar="FOLDER", help="a folder for one PNG per image, an .npz file, or a .png (a grid of images)"
    )


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
    stream, compress_seconds = _timed("compress", model, images, classes)
    decoded, decompress_seconds = _timed("decompress", model, stream, classes)
    if not torch.equal(decoded, images):
        raise RuntimeError("the decoded images are not those that were compressed: this is a bug")
    prefix = b"" if classes is None else _with_classes(classes, model.n_classes)
    files.write_atomically({path: prefix + stream})
    bits = float(-likelihood.log_likelihoods(model, images, classes).sum()) / math.log(2)
    size = "x".join(map(str, dataset.shape))
    print(f"{len(images)} {arguments.split} images of {dataset.name}, {size} with {dataset.levels} levels, in {path}")
    if prefix:
        print(f"the file also holds the classes, which the model needs: {len(prefix)} bytes more than in the table")
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
        f"images per second: compressed {len(images) / compress_seconds:.1f} (including the analysis of the model), "
        f"decoded {len(images) / decompress_seconds:.1f}; the naive loop would decode {naive:.3g} (computed from the "
        f"time of one forward pass, of which it runs {images[0].numel()} per image)"
    )
    return 0


def run_decompress(arguments: argparse.Namespace) -> int:
    from fastgen.plots import columns_of

    model = _model(arguments)
    target = check_target(arguments.out)
    if model.levels > 256 and target.suffix.lower() != ".npz":
        raise ValueError(
            f"--out {arguments.out}: a PNG holds at most 256 levels, not {model.levels}; write to NAME.npz"
        )
    data, classes = Path(arguments.file).read_bytes(), None
    try:
        if model.n_classes is not None:
            classes, data = _split_classes(data, model.n_classes)
        images, seconds = _timed("decompress", model, data, classes)
        if len(images) == 0:
            raise ValueError("data: holds no images")
    except ValueError as error:
        raise ValueError(f"{arguments.file}: {str(error).removeprefix('data: ')}") from error
    files = write_images(images, model.levels, target, columns=columns_of(len(images)), labels=classes)
    print(f"{len(images)} images in {files}, {len(images) / seconds:.1f} per second")
    return 0


def _model(arguments: argparse.Namespace) -> Any:
    from fastgen import checkpoint
    from fastgen.models.autoregressive import AutoregressiveModel

    device = device_of(arguments)
    model = checkpoint.load(arguments.folder).to(device)
    if not isinstance(model, AutoregressiveModel):
        raise ValueError(f"{arguments.folder}: {type(model).__name__} has no exact likelihood to compress images by")
    return model


def _timed(function: str, model: Any, argument: Any, classes: "Tensor | None") -> tuple[Any, float]:
    """The result of `fastgen.compress` or `fastgen.decompress`, and the seconds it took."""
    import fastgen

    start = time.perf_counter()
    try:
        result = getattr(fastgen, function)(model, argument, condition=classes)
    except ImportError as error:
        raise ValueError(str(error)) from error
    return result, time.perf_counter() - start


def _seconds_of_a_pass(model: Any, images: "Tensor", classes: "Tensor | None") -> float:
    """Seconds per image of a forward pass of the model over a batch of up to 64 images."""
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
    return _PREFIX.pack(CLASSES, len(classes)) + classes.numpy().astype(_class_type(n_classes)).tobytes()


def _split_classes(data: bytes, n_classes: int) -> "tuple[Tensor, bytes]":
    """The classes (n,) and the stream in a file of a class-conditional model. Raises ValueError for other files."""
    import numpy as np
    import torch

    dtype = _class_type(n_classes)
    if not data.startswith(CLASSES) or len(data) < _PREFIX.size:
        raise ValueError(f"data: is foreign: a file of a class-conditional model begins with {CLASSES!r}")
    count = _PREFIX.unpack_from(data)[1]
    end = _PREFIX.size + count * np.dtype(dtype).itemsize
    if len(data) < end:
        raise ValueError(f"data: is truncated: {len(data)} bytes, and its classes alone have {end}")
    classes = torch.from_numpy(np.frombuffer(data, dtype, count, _PREFIX.size).astype(np.int64))
    return classes, data[end:]


def other_codecs(images: "Tensor", levels: int) -> dict[str, int]:
    """Bytes that other lossless codecs take for images (n, C, H, W), by name: as one file per image, and as one picture
    of all images. Empty if picture files cannot hold this number of channels or levels."""
    import numpy as np
    from PIL import Image, features

    if images.shape[1] not in PICTURES or levels > 256:
        return {}
    options: dict[str, dict[str, Any]] = {"PNG": {"optimize": True}}
    if features.check("webp"):
        options["WebP"] = {"lossless": True, "quality": 100, "method": 6, "exact": True}
    try:
        import pillow_jxl  # noqa: F401 (registers the format with Pillow)
    except ImportError:
        pass
    else:
        options["JXL"] = {"lossless": True, "effort": 9}
    pixels = images.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    columns = math.ceil(math.sqrt(len(pixels)))
    padding = np.zeros((-len(pixels) % columns, *pixels.shape[1:]), np.uint8)
    rows = np.concatenate((pixels, padding)).reshape(-1, columns, *pixels.shape[1:])
    sheet = rows.transpose(0, 2, 1, 3, 4).reshape(-1, columns * pixels.shape[2], pixels.shape[3])

    def size(array: "np.ndarray", name: str) -> int:
        buffer = io.BytesIO()
        image = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
        image.save(buffer, name, **options[name])
        return len(buffer.getvalue())

    names = {"PNG": "PNG, optimized", "WebP": "WebP, lossless", "JXL": "JPEG XL, lossless"}
    sizes = {}
    for name in options:
        sizes[f"{names[name]}, one file per image"] = sum(size(image, name) for image in pixels)
        sizes[f"{names[name]}, one picture"] = size(sheet, name)
    return sizes
