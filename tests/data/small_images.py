"""Small images for tests of the data sets."""

import numpy as np
from PIL import Image


def grey(n=20, levels=256):
    return np.random.RandomState(0).randint(levels, size=(n, 5, 4)).astype(np.uint8)


def write_images(folder, images, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02}{suffix}")
