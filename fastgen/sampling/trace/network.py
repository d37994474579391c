"""A stranger's model as a function of levels, and its graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastgen.sampling.model_state import unchanged
from fastgen.sampling.trace.graph import Graph, Map, Operand, Unsupported, Value
from fastgen.sampling.trace.recorder import trace

MOST_ELEMENTS = 4 * 10**8  # of one image; beyond, the analysis would not fit into memory
HALF = (torch.float16, torch.bfloat16)


class Network:
    """model(encode(levels)[, condition]) on sample images; the condition has two rows wherever it has rows."""

    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        encode: Callable[[Tensor], Tensor],
        condition: Any,
        levels: int,
    ) -> None:
        self.model = model
        self.shape = tuple(shape)
        self.encode = encode
        self.levels = levels
        self._conditional = condition is not None
        self._leaves, self._structure = tree_flatten(condition)
        self._rows = [k for k, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor) and leaf.dim()]
        device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        self.samples = torch.randint(levels, (5, *shape), generator=generator).to(device)
        self.output_shape = tuple(self.run(self.samples[:2]).shape)

    def _call(self, levels: Tensor, *given: Tensor) -> Tensor:
        leaves = list(self._leaves)
        for k, leaf in zip(self._rows, given, strict=True):
            leaves[k] = leaf
        x = self.encode(levels.clone())  # encode, or the model, may write into its argument
        return self.model(x, tree_unflatten(leaves, self._structure)) if self._conditional else self.model(x)

    def _beside(self, levels: Tensor, *given: Tensor) -> Tensor:
        """Of the first of two images; the second is constant. For models that take a batch of one for none."""
        other = torch.cat((levels, self.samples[-1:]))
        rows = [torch.cat((leaf, self._leaves[k][:1])) for leaf, k in zip(given, self._rows, strict=True)]
        return self._call(other, *rows)[:1]

    @torch.no_grad()
    def run(self, levels: Tensor) -> Tensor:
        """The output for levels (n, C, H, W), all under the first row of the condition."""
        rows = [self._leaves[k][:1].expand(len(levels), *self._leaves[k].shape[1:]) for k in self._rows]
        with unchanged(self.model):
            return self._call(levels, *rows)

    def graph(self) -> tuple[Graph, list[Value]]:
        """The graph of one image, and the values of its condition.

        Raises:
            Unsupported: the model cannot be traced, or computes otherwise for other images or in other batches.
        """
        try:
            graph = self._checked(self._call, [0, 1])
        except Unsupported as reason:
            try:
                graph = self._checked(self._beside, [0, 1, 2])
            except Unsupported:
                raise reason from None
            graph.remarks.append(f"traced beside a second image, because alone {reason}")
        if graph.numel > MOST_ELEMENTS:
            raise Unsupported(f"the network of one image has {graph.numel:.1e} elements")
        expected = (1, *self.output_shape[1:])
        found = graph.output.map
        assert found is not None
        if graph.output.shape == expected[1:]:
            found = Map(found.value, expected, found.start, ((0,) * len(found.start), *found.steps))
            graph.output = Operand(graph, expected, map=found)
        if graph.output.shape != expected:
            raise Unsupported(f"one image gives the shape {graph.output.shape}, two give {self.output_shape}")
        return graph, [value for value in graph.values if value.kind == "condition"]

    def _checked(self, call: Callable[..., Tensor], images: list[int]) -> Graph:
        """The graph of call(levels, *rows of the condition) for one image; the same for several, as in a batch."""
        graphs = []
        for b in range(2):
            rows = [self._leaves[k][b : b + 1] for k in self._rows]
            try:
                with unchanged(self.model):
                    graphs.append(trace(call, self.model, self.samples[b : b + 1], rows))
            except Unsupported:
                raise
            except Exception as error:  # the model runs on two images, but not on one, or not under the recorder
                raise Unsupported(f"tracing one image fails: {type(error).__name__}: {error}") from error
        rows = [self._leaves[k][[b % 2 for b in images]] for k in self._rows]
        with torch.no_grad(), unchanged(self.model):
            _check_same(graphs, self._call(self.samples[images], *rows))
        return graphs[0]


def _check_same(graphs: Sequence[Graph], whole: Tensor) -> None:
    """The same operations for both images, each by itself as in a batch of both."""
    first, second = graphs
    same = len(first.values) == len(second.values)
    for a, b in zip(first.values, second.values, strict=False):
        same = same and a.shape == b.shape and a.op == b.op
        same = same and (a.kind != "constant" or torch.equal(a.data.nan_to_num(), b.data.nan_to_num()))
    if not same:
        raise Unsupported("the model computes in another way for other values of its input")
    precise = not any(value.data.dtype in HALF for value in first.values)
    for k, graph in enumerate(graphs):
        alone, together = graph.data_of(graph.output), whole[k].cpu()
        scale = together[together.isfinite()].abs().max() if together.isfinite().any() else 0
        tolerance = 1e-3 * float(scale) + 1e-5 if precise else 0.1 * float(scale)
        if alone.numel() != together.numel() or not torch.allclose(
            alone.reshape(together.shape), together, atol=tolerance, rtol=0, equal_nan=True
        ):
            raise Unsupported("an image's output depends on what else is in its batch")
