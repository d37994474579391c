"""Memory on large pages: zeros, each piece its own, also where the system has no such pages."""

import mmap

import pytest
import torch

from fastgen.sampling.machine.cpu.pages import LINE, PAGE, LargePages


@pytest.mark.parametrize("system", ["with large pages", "without"])
def test_pieces_are_zero_and_do_not_overlap(system, monkeypatch):
    if system == "without":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    pages = LargePages()
    sizes = [0, 1, 17, 1000, 3 * PAGE, 5, PAGE, 64]
    kinds = [torch.float32, torch.int64, torch.float64, torch.bool]
    pieces = [pages.take(size, kinds[k % 4]) for k, size in enumerate(sizes)]
    for k, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        assert piece.shape == (size,) and piece.dtype == kinds[k % 4] and not piece.any()
        piece.fill_(k % 2)
    for k, piece in enumerate(pieces):
        assert (piece == k % 2).all() and piece.data_ptr() % LINE == 0


def test_the_first_piece_begins_a_page():
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("this system has no large pages")
    assert LargePages().take(10, torch.float32).data_ptr() % PAGE == 0


def test_a_piece_outlives_what_handed_it_out():
    piece = LargePages().take(PAGE, torch.int64).fill_(7)
    others = [LargePages().take(PAGE, torch.int64).fill_(k) for k in range(4)]
    assert len(others) == 4 and (piece == 7).all()
