"""Reads images and masks from the user's files for a model, and writes images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ARRAYS = (".npy", ".npz")


def png_target(path: str) -> Path:
    """The path of a PNG to write, after a check, before the work begins, that its folder can be written to.

    Raises:
        ValueError: the path does not end in .png, or a folder of it is a file.
        OSError: the folder cannot be written to.
    """
    from fastgen import files, plots

    target = plots.png_path(path)
    files.make_folder(target.parent)
    return target


def check_target(path: str) -> Path:
    """The path of a .png, an .npz or a folder to write images to, checked as in `png_target`; raises as it does."""
    from fastgen import files

    target = Path(path)
    if target.suffix.lower() == ".npz":
        files.make_folder(target.parent)
        return target
    if target.suffix and not target.is_dir():
        return png_target(path)
    files.make_folder(target)
    return target


def write_images(images: "Tensor", levels: int, path: Path, *, columns: int, labels: "Tensor | None" = None) -> str:
    """Writes levels (n, C, H, W) on the CPU to a path that `check_target` returned. Returns the names of the files as
    text for a message."""
    import io

    import numpy as np
    from PIL import Image

    from fastgen import files, plots

    if path.is_dir():
        digits = len(str(len(images) - 1))
        for number, pixels in enumerate(plots.to_pixels(images, levels).numpy()):
            grey = (pixels == pixels[..., :1]).all() and images.shape[1] != 3
            image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels))
            files.write_atomically({path / f"{number:0{digits}}.png": plots.png(image)})
        return str(path)
    if path.suffix.lower() == ".npz":
        arrays: dict[str, Any] = {
            "images": images.numpy().astype(np.uint8 if levels <= 256 else np.int64),
            "levels": np.array(levels),
        }
        if labels is not None:
            arrays["labels"] = labels.numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        files.write_atomically({path: buffer.getvalue()})
        return str(path)
    pages = plots.image_pages(images, levels, path, columns=columns)
    return str(path) if len(pages) == 1 else f"{pages[0]} to {pages[-1].name}"


def read_images(path: str, model: Any, resize: int | None = None, crop: int | None = None) -> "Tensor":
    """Reads integer levels (n, C, H, W) for a model.

    Args:
        path: an image file or a folder of image files, whose 0..255 are scaled to the model's levels; or an .npy or
            .npz file of integer levels (H, W), (n, H, W), (C, H, W) or (n, C, H, W).
        resize, crop: as in `fastgen.data.load`, for image files.

    Raises:
        ValueError: the file is missing, or its images do not fit the model; names the file.
    """
    import torch

    channels = model.shape[0]
    if Path(path).suffix.lower() in ARRAYS:
        array = _array(path)
        if array.dtype.kind not in "biu" or array.size == 0 or array.min() < 0 or array.max() >= model.levels:
            raise ValueError(f"{path}: must hold integer levels 0..{model.levels - 1}")
        images = torch.from_numpy(array.astype("int64"))
    else:
        from fastgen.data.sources import image_files, read_pixels

        files = image_files(Path(path)) if Path(path).is_dir() else [Path(path)]
        if not files:
            raise ValueError(f"{path}: has no image files")
        pixels = torch.from_numpy(read_pixels(((str(file), file) for file in files), path, resize, crop)).double()
        if pixels.dim() == 4 and channels == 1:
            raise ValueError(f"{path}: is in colour, the model's images are grey")
        pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
        images = (pixels * ((model.levels - 1) / 255)).round().long()
        images = images.expand(-1, channels, -1, -1)
    if images.dim() == 2:  # one grey image
        images = images[None, None]
    elif images.dim() == 3:  # one image (C, H, W), or several grey ones (n, H, W)
        images = images.unsqueeze(0 if images.shape[0] == channels > 1 else 1)
    if tuple(images.shape[1:]) != model.shape:
        raise ValueError(f"{path}: the images have the shape {tuple(images.shape[1:])}, the model's are {model.shape}")
    return images


def read_mask(path: str, count: int, shape: tuple[int, int, int]) -> "Tensor":
    """Reads a mask of the pixels to keep, bool (1 or count, 1, H, W).

    Args:
        path: an image file, in which 128 or more of 255 means True; or an .npy or .npz file, in which anything but 0
            means True.
        count: number of images; the file holds one mask for all or one for each.
        shape: (C, H, W) of the images.

    Raises:
        ValueError: the file is missing, or holds no such masks; names the file.
    """
    import torch

    if Path(path).suffix.lower() in ARRAYS:
        known = torch.from_numpy(_array(path) != 0)
    else:
        from fastgen.data.sources import read_pixels

        pixels = torch.from_numpy(read_pixels([(path, path)], path))
        known = (pixels if pixels.dim() == 3 else pixels.float().mean(3)) >= 128
    known = known.unsqueeze(0) if known.dim() == 2 else known
    known = known.unsqueeze(1) if known.dim() == 3 else known
    if known.dim() != 4 or len(known) not in (1, count) or tuple(known.shape[1:]) != (1, *shape[1:]):
        raise ValueError(
            f"{path}: must hold 1 or {count} masks, each {shape[1]} rows of {shape[2]} pixels, got the shape "
            f"{tuple(known.shape)}"
        )
    return known


def _array(path: str) -> Any:
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = loaded.files
            return loaded["images" if "images" in names else names[0]]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except Exception as error:  # NumPy raises many exceptions for damaged files and for files of pickled objects
        raise ValueError(f"{path}: does not hold a plain array ({error})") from error
