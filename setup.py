"""Packaging. `kernels/` is installed as `fastgen.kernels`: `kernels` alone is an unrelated public package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fastgen/_version.py").read_text()).group(1)

EXTRAS = {
    "demo": ["scikit-learn>=1.3"],
    "plots": ["matplotlib>=3.7"],
    "data": ["datasets>=2.14"],
    "log": ["tensorboard"],
    "hub": ["huggingface_hub"],
    "compress": ["constriction>=0.4"],
    "config": ['tomli; python_version < "3.11"'],
    "benchmarks": ["pytest>=7", "pytest-benchmark>=4", "matplotlib>=3.7"],
    "dev": ["pytest>=7", "pytest-benchmark>=4", "pytest-xdist", "hypothesis", "mpmath", "ruff", "mypy"],
}

# fastgen/kernels is a link to kernels/ for working from a checkout: package it once, from its real place.
packages = [name for name in find_packages(include=["fastgen", "fastgen.*"]) if ".kernels" not in name]
kernel_packages = ["fastgen.kernels"] + [f"fastgen.kernels.{name}" for name in find_packages("kernels")]

setup(
    name="fastgen",
    version=VERSION,
    description="Triton kernels and exact, work-optimal sampling for PixelCNN, PixelRNN and VAE models",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=packages + kernel_packages,
    package_dir={"fastgen": "fastgen", "fastgen.kernels": "kernels"},
    package_data={"fastgen": ["py.typed", "**/*.cpp", "**/*.h"], "fastgen.kernels": ["**/*.json"]},
    # Triton is not required: CUDA builds of torch bring the one they match, and without it the
    # PyTorch definitions run.
    install_requires=["torch>=2.6", "numpy>=1.26", "safetensors>=0.4", "tqdm>=4.60", "pillow>=10"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fastgen = fastgen.cli:main"]},
)
