"""float32 is float32 while images are drawn: products in IEEE arithmetic, whatever PyTorch's settings allow.

The model's own passes decide about the images. Where they round to TF32 and the engine does not (or the other way
round), draws differ at many places and batches are drawn again and again.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The settings of PyTorch 2.9 and later, (backend, operation). A leaf without a value of its own takes its parent's.
PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
LEAVES = tuple((backend, operation) for backend in ("cuda", "mkldnn") for operation in ("matmul", "conv", "rnn"))

_turn = threading.RLock()  # the settings are the process's, so that whoever draws images takes turns


@contextmanager
def ieee_float32() -> Iterator[None]:
    """float32 products are IEEE's inside; all settings, older and newer, are as before afterwards. One thread at a
    time is inside."""
    with _turn:
        new = _take_new()
        old = _take_old()
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        for leaf in LEAVES if new else ():
            _set(leaf, "ieee")
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32, precision = old
            torch.set_float32_matmul_precision(precision)
            for key, value in new.items():
                _set(key, value)


def _take_new() -> dict[tuple[str, str], str]:
    """Each newer setting's own value, parents first. Takes them away: a getter gives a parent's value for none."""
    if not hasattr(torch._C, "_get_fp32_precision_getter"):
        return {}
    found = {}
    for key in (*PARENTS, *LEAVES):
        found[key] = torch._C._get_fp32_precision_getter(*key)
        _set(key, "none")
    return found


def _take_old() -> tuple[bool, str]:
    """The older settings. Their getters raise where the newer ones contradict them, which `_take_new` made void."""
    for leaf in LEAVES if hasattr(torch._C, "_get_fp32_precision_getter") else ():
        _set(leaf, "ieee")
    try:
        convolutions = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # "ieee" contradicts it
        convolutions = True
    return convolutions, torch.get_float32_matmul_precision()


def _set(key: tuple[str, str], value: str) -> None:
    settings: Any = torch._C
    settings._set_fp32_precision_setter(*key, value)
