"""Views, offsets and programs of the step language."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastgen.sampling.machine.language import (
    AffineOffset,
    Call,
    Fixed,
    Memory,
    Pointwise,
    Product,
    Program,
    View,
    constant,
    dense_strides,
    views_of,
)

F32 = torch.float32


def of(view, data):
    """What a view of one image's memory holds."""
    return data.as_strided(view.sizes, view.strides, view.offset.at(()))


@pytest.fixture
def data():
    return torch.arange(3 * 4 * 5)


@pytest.fixture
def view(data):
    return View(Memory("stored", 0, 60, F32), (3, 4, 5), dense_strides((3, 4, 5)), AffineOffset(0), 0)


def test_offsets_add_and_multiply_like_the_maps_that_they_are():
    a, b = AffineOffset(1, (2, 3)), AffineOffset(Fraction(1, 2), (0, 0, Fraction(1, 2)))
    start = (5, 7, 9)
    assert (a + b * 2).at(start) == a.at(start) + 10
    assert (a + 4).at(start) == a.at(start) + 4 and (a * 3).at(start) == 3 * a.at(start)
    assert (b + AffineOffset(Fraction(1, 2))).at((0, 0, 4)) == 3
    starts = np.array([[0, 0, 1], [1, 2, 3], [4, 0, 9]])
    assert (a + b).over(starts).tolist() == [(a + b).at(one) for one in starts.tolist()]
    assert a.over(np.array([[1, 1, 1]])).tolist() == [6]


def test_an_offset_between_two_numbers_is_an_error():
    with pytest.raises(AssertionError):
        AffineOffset(0, (Fraction(1, 2),)).at((1,))


def test_views_are_what_torch_makes_of_the_tensor(data, view):
    tensor = data.view(3, 4, 5)
    assert torch.equal(of(view.order([2, 0, 1]), data), tensor.permute(2, 0, 1))
    narrow = view.narrow(1, 1, 2, 2)
    assert torch.equal(of(narrow, data), tensor[:, 1:4:2])
    assert torch.equal(of(narrow.narrow(2, 3, 2), data), tensor[:, 1:4:2, 3:])
    assert torch.equal(of(narrow.unsqueeze(1), data), tensor[:, None, 1:4:2])
    column = view.narrow(2, 4, 1)
    assert torch.equal(of(column.expand((2, 3, 4, 5)), data), tensor[..., 4:].expand(2, 3, 4, 5))
    assert of(narrow.collapse(), data).flatten().tolist() == tensor[:, 1:4:2].flatten().tolist()
    assert narrow.span == of(narrow, data).max() - of(narrow, data).min()


@pytest.mark.parametrize(
    ("sizes", "strides", "expected"),
    [
        ((3, 4, 5), (20, 5, 1), ((60,), (1,))),
        ((3, 1, 5), (20, 7, 1), ((3, 5), (20, 1))),
        ((3, 4, 5), (40, 10, 2), ((60,), (2,))),
        ((3, 4, 5), (5, 15, 1), ((3, 4, 5), (5, 15, 1))),
        ((2, 4, 5), (0, 5, 1), ((2, 20), (0, 1))),
        ((1, 1), (9, 9), ((), ())),
    ],
)
def test_dimensions_that_lie_as_one_are_one(view, sizes, strides, expected):
    found = replace(view, sizes=sizes, strides=strides).collapse()
    assert (found.sizes, found.strides) == expected


def test_dense_strides_are_those_of_torch():
    assert dense_strides((3, 4, 5)) == torch.empty(3, 4, 5).stride()
    assert (
        dense_strides((2, 3, 4, 5), [0, 2, 3, 1])
        == torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).stride()
    )
    assert dense_strides(()) == ()


def test_a_constant_has_memory_of_its_own_whatever_the_layout():
    data = torch.arange(12.0).view(3, 4)
    view = constant(data.T[1:])
    assert torch.equal(of(view, view.memory.data), data.T[1:])
    data.zero_()
    assert view.memory.data.any() and constant(data).memory != constant(data).memory


def program(view, weight, offset, word="add", task=0, listed=None):
    moving = replace(view, offset=offset, task=task, listed=listed)
    return Program([Product(view, moving, weight), Pointwise(word, view, (moving, 1.0))])


def test_programs_are_equal_that_do_the_same(view):
    """Equal programs serve each other's steps, so they must differ in nothing."""
    weight, tensor = constant(torch.ones(5, 5)), torch.ones(2)
    affine = AffineOffset(3, (1, 2))
    one = program(view, weight, affine)
    again = program(replace(view), weight, AffineOffset(3, (1, 2)))
    assert one.key == again.key and hash(one.key) == hash(again.key)
    others = [
        program(view, constant(torch.ones(5, 5)), affine),
        program(view, weight, AffineOffset(4, (1, 2))),
        program(view, weight, affine, word="sub"),
        program(view, weight, affine, task=1),
        program(view, weight, affine, listed=0),
        program(replace(view, strides=(20, 5, 0)), weight, affine),
        program(replace(view, memory=replace(view.memory, dtype=torch.float64)), weight, affine),
    ]
    assert all(one.key != other.key for other in others)
    call, other = (Call(torch.add, (view, Fixed(t))) for t in (tensor, tensor.clone()))
    assert call == Call(torch.add, (view, Fixed(tensor))) and call != other


def test_views_that_move_have_a_place_each_in_the_order_of_their_use(view):
    moving = replace(view, offset=AffineOffset(1, (0, 6)))
    later = replace(view, offset=AffineOffset(0, (2,)), task=1)
    listed = replace(view, listed=1, task=1)
    found = Program(
        [Pointwise("add", later, (moving, moving)), Call(torch.add, (view, (listed, later)), (("out", moving),))]
    )
    assert found.moving() == [later, moving, listed]
    assert list(views_of(found.instructions[1])) == [view, listed, later, moving]
    starts = [np.array([[0, 1], [2, 3]]), np.array([[5, 0], [6, 0]])]
    offsets = found.offsets(starts, np.array([[70, 71], [80, 81]]))
    assert offsets.tolist() == [[10, 7, 71], [12, 19, 81]] and offsets.dtype == np.int64
