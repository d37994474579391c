"""Convolutions of many groups, depthwise ones above all: one product for all groups of a part of the result."""

from fastgen.sampling.machine.language import View, dense_strides
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.convolution import PRECISE, Convolution, extent

FEW_GROUPS = 8  # groups up to which each is a product of its own


class GroupedConvolution(Convolution):
    """Weights are (groups, depth, channels of a group); depth counts the inputs of a group at all taps."""

    def emit(self, builder: Builder, box: Box) -> None:
        groups, (per, outs) = self._groups(box), (self.live.shape[1], len(self.live) // self.groups)
        sums_of_half = self.value.data.dtype not in PRECISE and (self.bias is not None or self.onto is not None)
        if not groups or sums_of_half:
            super().emit(builder, box)
            return
        out = builder.out(self.value, box)
        added = self._added(builder, box, out)
        cut = [extent(self.live.movedim(2 + d, 0).flatten(1).any(1)) for d in range(self.rank)]
        inputs = per * groups[0], per * (groups[-1] - groups[0] + 1)
        seen, places, along = self._window_at(builder, box, inputs, cut)
        sizes = (box.sizes[0], *box.sizes[2:], len(groups))
        strides = (*places, per * groups.step * seen.strides[1])
        taps = tuple(last - first for first, last in cut)
        terms = seen.as_strided((per, *taps), (seen.strides[1], *along)).collapse()
        if len(terms.sizes) > 1:  # side by side
            rows = builder.scratch((*sizes, 1, terms.numel), self.value.data.dtype)
            inner = (*rows.strides[:-2], *dense_strides(terms.sizes))
            both = seen.as_strided((*sizes, *terms.sizes), (*strides, *terms.strides))
            builder.pointwise("copy", rows.as_strided(both.sizes, inner), both)
        else:
            rows = seen.as_strided((*sizes, 1, terms.numel), (*strides, 0, *(terms.strides or (0,))))
        weight = self.weight.unflatten(0, (self.groups, outs))[groups.start : groups.stop : groups.step]
        weight = weight[(..., *(slice(first, last) for first, last in cut))]
        # Groups lie next to each other, as channels do, so that the sums of many advance together.
        weight = weight.permute(*range(2, weight.dim()), 0, 1)
        every = self._weights(("grouped", groups), weight, (terms.numel, len(groups), outs))
        every = every.order((1, 0, 2)).expand((*sizes, terms.numel, outs))
        added = None if added is None else _by_groups(added, outs)
        builder.product(_by_groups(out, outs), rows, every, added)

    def _groups(self, box: Box) -> range:
        """Those that a box's channels are all of; none where they are not all of some, in their order."""
        first, count, step = box.start[1], box.sizes[1], box.steps[1]
        outs = len(self.live) // self.groups
        if outs == 1:
            return range(first, first + (count - 1) * step + 1, step)
        whole = step == 1 and first % outs == 0 and count % outs == 0
        return range(first // outs, (first + count) // outs) if whole else range(0)


def _by_groups(view: View, outs: int) -> View:
    """Channels (N, C, places ...) as rows (N, places ..., groups, 1, channels of a group)."""
    sizes, strides = ((one[0], *one[2:]) for one in (view.sizes, view.strides))
    groups, channel = view.sizes[1] // outs, view.strides[1]
    return view.as_strided((*sizes, groups, 1, outs), (*strides, outs * channel, 0, channel))
