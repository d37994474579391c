"""One function for each source of images. No source unpickles data or runs code that it reads."""

import gzip
import hashlib
import os
import tarfile
import urllib.request
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen.data.dataset import Dataset, Split, assemble
from fastgen.files import write_atomically

PATCH = 32
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
GREY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"}
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_FILE = "cifar-10-binary.tar.gz"  # the "python version" is a pickle
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue plane


def digits() -> Dataset:
    """1,797 digits of UCI's Optical Recognition of Handwritten Digits: the first 1,350 for training, the next 150 for
    validation, the last 297 for test. They are not shuffled: digits of one writer follow each other, so that most test
    digits are by writers that are not in the training images."""
    bunch = _sklearn_datasets().load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)
    digits = Split(images, torch.from_numpy(bunch.target.astype(np.int64)))
    return Dataset("digits", 17, 10, digits[:1350], digits[1350:1500], digits[1500:])


def patches() -> Dataset:
    """32x32 patches of china.jpg and flower.jpg (427x640). The columns of each photograph are divided among training
    (0..415, a patch at every eighth pixel), validation (416..511) and test (512..639, both without overlaps)."""
    photographs = _sklearn_datasets().load_sample_images().images

    def cut(left: int, right: int, stride: int) -> Split:
        windows = [
            torch.from_numpy(np.array(image))[:, left:right].unfold(0, PATCH, stride).unfold(1, PATCH, stride)
            for image in photographs
        ]
        return Split(torch.cat([part.flatten(0, 1) for part in windows]).contiguous())

    attribution = (
        "photographs china.jpg by danielbuechele (flickr.com/photos/danielbuechele/6061409035) and flower.jpg by "
        "vultilion (flickr.com/photos/vultilion/6056698931), CC BY 2.0, cut into patches"
    )
    return Dataset("patches", 256, None, cut(0, 416, 8), cut(416, 512, PATCH), cut(512, 640, PATCH), attribution)


def _sklearn_datasets():
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError("this data set needs scikit-learn: pip install scikit-learn") from error
    return datasets


def npz(path: str, levels: int | None = None) -> Dataset:
    """An .npz file with arrays `train`, `validation` and `test` (or `x_train`, ...), and classes under the same names
    with `_labels` (or `y_train`, ...). A single array, or `images` with `labels`, holds training images. `levels` in
    the file is the number of levels, unless the argument states another."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise ValueError(f"npz:{path}: no such file") from error
    except Exception as error:  # NumPy raises many exceptions for damaged files and for files of pickled objects
        raise ValueError(f"npz:{path}: is not an .npz file of plain arrays ({error})") from error
    if "levels" in arrays:
        count = arrays.pop("levels")
        if count.ndim or not np.issubdtype(count.dtype, np.integer) or not 2 <= count <= 256:
            raise ValueError(f"npz:{path}: levels must be one integer in 2..256, got {count!r}")
        levels = levels or int(count)
    if len(arrays) == 1 and not {"train", "x_train"} & arrays.keys():
        arrays = {"images": next(iter(arrays.values()))}
    splits = {}
    for name in ("train", "validation", "test"):
        for images, labels in (
            (name, f"{name}_labels"),
            (f"x_{name}", f"y_{name}"),
            *([("images", "labels")] if name == "train" else []),
        ):
            if images in arrays and name not in splits:
                splits[name] = (arrays.pop(images), arrays.pop(labels, None))
    if arrays or not splits:
        raise ValueError(
            f"npz:{path}: expected arrays named train, validation, test (or x_train, ..., or images) with labels named "
            f"train_labels (or y_train, or labels), and levels; got {', '.join(sorted(arrays)) or 'nothing'}"
        )
    return assemble(splits, levels, f"npz:{path}")


def folder(path: str, levels: int | None = None, resize: int | None = None, crop: int | None = None) -> Dataset:
    """Image files of one size in PATH/train, PATH/validation and PATH/test, or all in PATH.

    If every image is in a subfolder, the subfolders are classes, numbered in alphabetical order. The images are grey if
    all files are grey, otherwise RGB. Hidden files are ignored, transparent pixels are blended with white, and images
    are rotated as their EXIF data says."""
    source, root = f"folder:{path}", Path(path)
    if not root.is_dir():
        raise ValueError(f"{source}: no such folder")
    roots = {name: root / name for name in ("train", "validation", "test") if (root / name).is_dir()}
    if "train" not in roots:
        roots = {"train": root}
    files = {name: image_files(part) for name, part in roots.items()}
    if not files["train"]:
        raise ValueError(f"{source}: has no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
    # The subfolder of each file as a tuple of its name; () for a file outside of subfolders.
    subfolders = {name: [file.relative_to(roots[name]).parts[:-1][:1] for file in part] for name, part in files.items()}
    classes = sorted({subfolder for part in subfolders.values() for subfolder in part})
    pixels = read_pixels(((str(file), file) for part in files.values() for file in part), source, resize, crop)
    splits, start = {}, 0
    for name, part in files.items():
        if part:
            labels = None if () in classes else np.array([classes.index(subfolder) for subfolder in subfolders[name]])
            splits[name] = (pixels[start : start + len(part)], labels)
            start += len(part)
    return assemble(splits, levels, source, files=True)


def image_files(root: Path) -> list[Path]:
    """All image files below a folder, sorted, without hidden ones."""

    def visible(file: Path) -> bool:
        return not any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(root).parts)

    files = (file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(file for file in files if visible(file) and file.is_file())


def read_pixels(
    images: Iterable[tuple[str, Any]], source: str, resize: int | None = None, crop: int | None = None
) -> np.ndarray:
    """Reads images as uint8 (n, H, W), or as (n, H, W, 3) if one of them has colours.

    Args:
        images: (name, image) pairs; the name is for error messages, the image is a path or a PIL image.
        source: name of the data set, for error messages.
        resize, crop: as in `fastgen.data.load`.

    Raises:
        ValueError: a file is not an image with 8 bits per channel, is too small for `crop`, or the sizes differ.
    """
    from PIL import Image, ImageOps

    opened: list[tuple[str, Image.Image]] = []
    for name, image in images:
        try:
            image = image if isinstance(image, Image.Image) else Image.open(image)
            image = ImageOps.exif_transpose(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{source}: {name} is not an image that can be read ({error})") from error
        if image.mode not in GREY_MODES | COLOUR_MODES:
            raise ValueError(f"{source}: {name} has the mode {image.mode}, expected 8 bits per channel")
        image = _cut(_over_white(image), f"{source}: {name}", resize, crop)
        if opened and image.size != opened[0][1].size:
            first, size = opened[0][0], "x".join(map(str, opened[0][1].size))
            raise ValueError(
                f"{source}: {name} is {image.size[0]}x{image.size[1]} and {first} is {size}; make them one size with "
                "resize=N and crop=N (--resize N --crop N)"
            )
        opened.append((name, image))
    mode = "L" if all(image.mode == "L" for _, image in opened) else "RGB"
    return np.stack([np.asarray(image.convert(mode)) for _, image in opened])


def _over_white(image: Any) -> Any:
    """A PIL image in the mode "L" or "RGB"; transparent pixels are blended with white."""
    from PIL import Image

    mode = "L" if image.mode in GREY_MODES else "RGB"
    if "A" not in image.mode.removeprefix("LAB") and "transparency" not in image.info:
        return image.convert(mode)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)


def _cut(image: Any, name: str, resize: int | None, crop: int | None) -> Any:
    """A PIL image, scaled so that its shorter side has `resize` pixels, then cropped to the central square of
    `crop`."""
    from PIL import Image

    if resize is not None:
        scale = resize / min(image.size)
        image = image.resize([max(resize, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    if crop is not None:
        width, height = image.size
        if min(width, height) < crop:
            raise ValueError(f"{name} is {width}x{height}, too small for crop={crop}; resize={crop} makes it fit")
        left, top = (width - crop) // 2, (height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    return image


def hub(name: str, levels: int | None = None, resize: int | None = None, crop: int | None = None) -> Dataset:
    """A data set of the Hugging Face hub, or a folder that `datasets.load_dataset` reads. Uses its first column of
    images and its first column of class labels."""
    source = f"hf:{name}"
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source}: needs the datasets package: pip install datasets") from error
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # network errors, unknown names and damaged files raise many exceptions
        raise ValueError(f"{source}: cannot be loaded ({error})") from error
    splits: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    parts = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
    chosen = {part: loaded[key] for part, keys in parts.items() for key in keys if key in loaded}
    if "train" not in chosen:
        raise ValueError(f"{source}: has no training images (its splits: {', '.join(loaded)})")
    features = chosen["train"].features
    columns = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"{source}: has no column of images (its columns: {', '.join(features)})")
    classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    images = ((f"{part} {i}", row) for part, rows in chosen.items() for i, row in enumerate(rows[columns[0]]))
    pixels, start = read_pixels(images, source, resize, crop), 0
    for part, rows in chosen.items():
        labels = np.array(rows[classes[0]]) if classes else None
        splits[part] = (pixels[start : start + len(rows)], labels)
        start += len(rows)
    return assemble(splits, levels, source, files=True)


# --- downloaded once


def cache_folder() -> Path:
    """The folder of downloaded files: the environment variable FASTGEN_DATA, or ~/.cache/fastgen."""
    return Path(os.environ.get("FASTGEN_DATA") or Path.home() / ".cache" / "fastgen")


def _download(name: str, url: str, md5: str) -> Path:
    """The path of a file in the cache. If it is missing, it is downloaded and compared with its checksum."""
    path = cache_folder() / name
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(url + path.name, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise OSError(f"{url}{path.name} cannot be downloaded ({error}); put the file at {path} by hand") from error
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != md5:
        raise ValueError(f"{url}{path.name}: its MD5 is {actual}, expected {md5}; nothing was saved")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path: content})
    return path


def mnist() -> Dataset:
    """MNIST (LeCun et al. 1998): 60,000 training images, of which a tenth is held out for validation, and 10,000 test
    images."""
    arrays = [_idx(_download(f"mnist/{name}", MNIST_URL, md5)) for name, md5 in MNIST_MD5.items()]
    return assemble({"train": (arrays[0], arrays[1]), "test": (arrays[2], arrays[3])}, 256, "mnist")


def _idx(path: Path) -> np.ndarray:
    """Reads an array in MNIST's gzipped IDX format: two zeros, type 8 (uint8), the number of dimensions, the sizes as
    big-endian 32-bit integers, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
        if content[:3] != b"\0\0\x08":
            raise ValueError("it is not an IDX file of bytes")
        sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes.tolist())
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to download it again") from error


def cifar10() -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 50,000 training images, of which a tenth is held out for validation, and 10,000 test
    images."""
    path = _download(f"cifar10/{CIFAR10_FILE}", CIFAR10_URL, CIFAR10_MD5)
    batches = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = Path(member.name).name
                file = archive.extractfile(member) if name.endswith("_batch.bin") or "data_batch" in name else None
                if file is not None:
                    batches[name] = np.frombuffer(file.read(), np.uint8).reshape(-1, CIFAR10_RECORD)
        test = batches.pop("test_batch.bin")
        train = np.concatenate([batches[name] for name in sorted(batches)])
    except (tarfile.TarError, ValueError, KeyError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to download it again") from error
    records = {"train": train, "test": test}
    return assemble(
        {name: (part[:, 1:].reshape(-1, 3, 32, 32), part[:, 0].astype(np.int64)) for name, part in records.items()},
        256,
        "cifar10",
    )
