"""Packages of other people, whose models are accelerated as they are."""

import importlib
import importlib.util

import pytest
import torch


def other_package(name):
    """The package; where it is not installed, the test (or the whole file) is skipped, which is said."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the package {name} is not installed", allow_module_level=True)
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            # Its library for CUDA does not load beside PyTorch for CPUs. Both packages import it, and use none of the
            # operators that it then misses.
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            HELD.append(library)
    return importlib.import_module(name)


HELD = []  # the definitions of a library end with it
