import pytest
import torch

from fastgen.ops import causal_mask


@pytest.mark.parametrize("size", [1, 3, 5, (1, 3), (5, 1), (3, 7)], ids=str)
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_sees_what_comes_before_in_raster_order(mask_type, size):
    mask = causal_mask(mask_type, 2, 3, size)
    height, width = (size, size) if isinstance(size, int) else size
    assert mask.shape == (2, 3, height, width)
    assert mask.dtype == torch.bool
    place = torch.arange(height * width).view(height, width)
    centre = place[height // 2, width // 2]
    expected = place < centre if mask_type == "A" else place <= centre
    assert (mask == expected).all()


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_colours_are_ordered_at_the_centre(mask_type):
    mask = causal_mask(mask_type, 6, 3, 3, 3)
    for o in range(6):
        for i in range(3):
            assert mask[o, i, 1, 1] == (i < o // 2 if mask_type == "A" else i <= o // 2)
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0)):
        assert mask[:, :, row, column].all()
    assert not mask[:, :, 1, 2].any()
    assert not mask[:, :, 2].any()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("C", 1, 1, 3), "mask_type"),
        (("A", 1, 1, 4), "kernel_size"),
        (("A", 1, 1, (3, 2)), "kernel_size"),
        (("A", 1, 1, (3, 3, 3)), "kernel_size"),
        (("A", 1, 1, 0), "kernel_size"),
        (("A", 1, 1, 3.0), "kernel_size"),
        (("A", 1, 1, None), "kernel_size"),
        (("A", 1, 1, True), "kernel_size"),
        (("A", 4, 3, 3, 3), "out_channels"),
        (("A", 3, 4, 3, 3), "in_channels"),
        (("A", 0, 1, 3), "out_channels"),
        (("A", 3, 3, 3, 0), "data_channels"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        causal_mask(*arguments)
