"""Choices along a dimension as instructions: the strongest numbers, and their places.

Each number takes a round of a few instructions; where there are more than a few, torch chooses in one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastgen.sampling.machine.language import AffineOffset, View
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.base import SOFTMAX_ZERO, Rule, argument, constant_operand
from fastgen.sampling.trace.graph import Operand

if TYPE_CHECKING:
    from fastgen.sampling.rules.slicewise import Slicewise

MOST_PLACES = 16


def first_of_greatest(builder: Builder, row: View, greatest: View, left: View) -> View:
    """How many places there are from the first of the greatest numbers on, along the last dimension; left: how many
    there are from each number on, see `falling`."""
    are, numbered = builder.scratch(row.sizes, torch.bool), builder.scratch(row.sizes, torch.float32)
    first = builder.scratch(greatest.sizes, torch.float32)
    builder.pointwise("eq", are, row, greatest.expand(row.sizes))
    builder.pointwise("mul", numbered, are, left)
    builder.rowwise("amax", first, numbered)
    builder.pointwise("maximum", first, first, 1.0)  # where all are NaN
    return first


def put_place(builder: Builder, out: View, first: View, row: View) -> None:
    """The number of the place that `first_of_greatest` has found in a row."""
    place = builder.scratch(first.sizes, torch.float32)
    builder.pointwise("sub", place, float(row.sizes[-1]), first)
    builder.pointwise("copy", out, place)


def falling(rule: Rule, builder: Builder, row: View) -> View:
    """How many places there are from each one on, along the last dimension of a view."""
    size = row.sizes[-1]
    return builder.read(rule.analysis.falling(size), [(AffineOffset(0), size, 1)]).expand(row.sizes)


def strongest(rule: Slicewise, builder: Builder, box: Box) -> bool:
    """topk: the greatest, again and again, of those that have not been taken; of equal ones the first.

    Which of equal ones torch takes is not specified. Their values are the same; where numbers of places are asked for,
    and numbers are equal by construction (zeros of a ReLU, what a mask hides), torch chooses here, too."""
    value, (dim,) = rule.value, rule.dims
    x, greatest_first = value.args[0], argument(value, "largest")
    wanted = range(box.start[dim], box.start[dim] + box.sizes[dim] * box.steps[dim], box.steps[dim])
    if wanted[-1] >= MOST_PLACES or not x.dtype.is_floating_point or not argument(value, "sorted"):
        return False
    if value.output == 1 and not _differ(x):
        return False
    region = rule.region_of(x, builder.region(box))
    out, row = _dim_last(builder.out(value, box), dim), _dim_last(builder.read(x, region), dim)
    if not greatest_first:
        negative = builder.scratch(row.sizes, x.dtype)
        builder.pointwise("neg", negative, row)
        row = negative
    left = falling(rule, builder, row)
    for number in range(wanted[-1] + 1):
        greatest = builder.scratch((*row.sizes[:-1], 1), x.dtype)
        builder.rowwise("amax", greatest, row)
        target = out.narrow(len(box.sizes) - 1, wanted.index(number), 1) if number in wanted else None
        if target is not None and value.output == 0:
            builder.pointwise("copy" if greatest_first else "neg", target, greatest)
            if number == wanted[-1]:
                break
        first = first_of_greatest(builder, row, greatest, left)
        if target is not None and value.output == 1:
            put_place(builder, target, first, row)
        if number < wanted[-1]:
            taken, rest = builder.scratch(row.sizes, torch.bool), builder.scratch(row.sizes, x.dtype)
            builder.pointwise("eq", taken, left, first.expand(row.sizes))
            builder.pointwise("hide", rest, row, taken)
            row = rest
    return True


# Operations whose results are equal by chance alone; and those of which that is so where it is of their operands.
SMOOTH = {"mm", "addmm", "bmm", "baddbmm", "convolution"}
KEEP_APART = {"_softmax", "_log_softmax", "sigmoid", "clone", "add", "sub", "mul", "div"}


def _differ(operand: Operand) -> bool:
    """Whether computed numbers are known to be equal by chance alone."""
    if operand.map is None or operand.map.padded or operand.map.value.kind != "computed":
        return False
    value = operand.map.value
    name = value.op_name
    if name not in KEEP_APART:
        return name in SMOOTH
    for one in value.operands:
        if not constant_operand(one):
            keeps = _differ(one)
        elif name in ("mul", "div"):
            keeps = bool((one.graph.data_of(one) != 0).all())
        else:
            keeps = bool((one.graph.data_of(one) > SOFTMAX_ZERO).all())  # no mask
        if not keeps:
            return False
    return True


def _dim_last(view: View, dim: int) -> View:
    return view.order([*(d for d in range(len(view.sizes)) if d != dim), dim])
