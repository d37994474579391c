"""Takes a stranger's model; gives it as a function of levels on sample images, and its graph: `Network`."""

import dis
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastgen.sampling.model_state import Kept, device_of, unchanged
from fastgen.sampling.trace.comparison import same_operations
from fastgen.sampling.trace.graph import Graph, Map, Operand, Unsupported, Value
from fastgen.sampling.trace.recorder import Number, trace

RAISE = dis.opmap["RAISE_VARARGS"]
MOST_READS = 16  # each takes a trace or a few
MOST_ELEMENTS = 4 * 10**8  # of one image; beyond, the analysis would not fit into memory
HALF = (torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def sample_images(model: nn.Module, shape: Sequence[int], levels: int | Tensor | torch.dtype | None) -> Tensor:
    """Images (5, C, H, W) on the device of a model, always the same ones: see `Network`."""
    generator, device, size = torch.Generator().manual_seed(0), device_of(model), (5, *shape)
    if isinstance(levels, torch.dtype):
        return torch.randn(size, generator=generator, dtype=torch.float32).to(levels).to(device)
    if isinstance(levels, int):
        return torch.randint(levels, size, generator=generator).to(device)
    if levels is not None:
        return (torch.randint(2**32, size, generator=generator) % levels).to(device)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return (torch.rand(size, generator=generator, dtype=torch.float32) * 2 - 1).to(dtype).to(device)


class Network:
    """model(encode(levels)[, condition]) on sample images; the condition has two rows wherever it has rows.

    Args:
        model: a stranger's; `shape`, `encode` and `condition` are as in `accelerate`.
        levels: how many a channel has, or each place, or the dtype of real values; None: images are floats in [-1, 1].
        kept: what the model runs in, `unchanged` where it is None.
        of_two: the output for the first two of `sample_images`, where it is known.

    Attributes:
        samples: images (5, C, H, W).
        extremes: the least and the greatest that a level of an image can be.
        output_shape: of the output for two images.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        encode: Callable[[Tensor], Tensor],
        condition: Any,
        levels: int | Tensor | torch.dtype | None,
        kept: Kept | None = None,
        of_two: Tensor | None = None,
    ) -> None:
        self.model, self.shape, self.encode, self.condition = model, shape, encode, condition
        self.kept: Kept = kept or partial(unchanged, model)
        self.device = device_of(model)
        self._traced_beside = False
        self._leaves, self._structure = tree_flatten(condition)
        self._met: dict[int, Tensor] = {}  # the least and the greatest integer of a leaf
        self._rows = [k for k, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor) and leaf.dim()]
        while True:
            self.extremes: tuple[int, int | Tensor] = (-1, 1)
            if isinstance(levels, (int, Tensor)):
                self.extremes = (0, levels - 1)
            self.samples = sample_images(model, shape, levels)
            try:
                self._of_two = self._together([0, 1]) if of_two is None else of_two
                break
            except Exception:  # some places may have fewer levels than others, as columns of a table have
                if not isinstance(levels, int) or levels <= 2:
                    raise
                levels = (levels + 1) // 2
        check_output(self._of_two)
        self.output_shape = tuple(self._of_two.shape)

    def _call(self, levels: Tensor, *given: Tensor) -> Tensor:
        leaves = list(self._leaves)
        for k, leaf in zip(self._rows, given, strict=True):
            leaves[k] = leaf
        x = self.encode(levels.clone())  # which may write into its argument
        return self.model(x, tree_unflatten(leaves, self._structure)) if self.condition is not None else self.model(x)

    def _beside(self, levels: Tensor, *given: Tensor) -> Tensor:
        """Of the first of two images; the second is constant. For models that take a batch of one for none."""
        other = torch.cat((levels, self.samples[-1:]))
        rows = [torch.cat((leaf, self._leaves[k][:1])) for leaf, k in zip(given, self._rows, strict=True)]
        return self._call(other, *rows)[:1]

    @torch.no_grad()
    def run(self, levels: Tensor) -> Tensor:
        """The output for levels (n, C, H, W), all under the first row of the condition."""
        rows = [self._leaves[k][:1].expand(len(levels), *self._leaves[k].shape[1:]) for k in self._rows]
        with self.kept():
            return self._call(levels, *rows)

    @torch.no_grad()
    def meet(self, condition: Any) -> None:
        """Runs the model for rows of a condition with smaller or larger integers than it has met: it alone knows how
        many classes there are, and raises what it raises where there are fewer."""
        leaves = tree_flatten(condition)[0]
        for k in self._rows:
            if leaves[k].dtype not in INTEGERS or leaves[k].numel() == 0:
                continue
            met = torch.stack(self._leaves[k].aminmax()) if k not in self._met else self._met[k]
            flat = leaves[k].flatten().unflatten(0, (len(leaves[k]), -1))
            least, greatest = flat.amin(1), flat.amax(1)
            if bool((least.amin() < met[0]) | (greatest.amax() > met[1])):
                rows = torch.stack((least.argmin(), greatest.argmax()))
                with self.kept():
                    self._call(self.samples[:2], *(leaves[one][rows] for one in self._rows))
            self._met[k] = torch.stack((met[0].minimum(least.amin()), met[1].maximum(greatest.amax())))

    def graph(self) -> tuple[Graph, list[Value]]:
        """The graph of one image, and the values of its condition.

        Raises:
            Unsupported: the model cannot be traced, or computes otherwise for other images or in other batches.
        """
        try:
            graph = self._checked(self._call, [0, 1])
        except Unsupported as reason:
            try:
                graph, self._traced_beside = self._checked(self._beside, [0, 1, 2]), True
            except Unsupported:
                raise reason from None
            graph.remarks.append(f"traced beside a second image, because alone {reason}")
        self._check_answers(graph)
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

    def once_more(self) -> Graph:
        """The graph of the model as it is now, not checked against other images."""
        return self._traced(self._beside if self._traced_beside else self._call, 0)

    def _check_answers(self, graph: Graph) -> None:
        """Where the model reads numbers that depend on its input, as in `if (x == end).any()`, the graph holds for
        these numbers alone. It is traced with others: it must stay the same, or the model refuse them."""
        if len(graph.reads) > MOST_READS:
            raise Unsupported(f"the model reads {len(graph.reads)} numbers that depend on its input", graph)
        call = self._beside if self._traced_beside else self._call
        for number, found in enumerate(graph.reads):
            others: list[Number] = [not found] if isinstance(found, bool) else [0, -1, found + 1, 2 * found + 10]
            for other in others:
                try:
                    another = self._traced(call, 0, graph, {number: other})
                except Unsupported as error:
                    if error.__cause__ is not None and _refuses(error.__cause__):
                        continue
                    another = None
                same = (
                    another is not None
                    and same_operations(graph, another)
                    and torch.equal(graph.result.nan_to_num(), another.result.nan_to_num())
                )
                if not same:
                    raise Unsupported(
                        f"the model computes in another way where a number that depends on its input is {other} "
                        f"instead of {found}",
                        graph,
                    )
        if graph.reads:
            graph.remarks.append(
                "it reads numbers that depend on its input: others led to the same operations or to an error of its own"
            )

    def _traced(
        self,
        call: Callable[..., Tensor],
        b: int,
        like: Graph | None = None,
        answers: dict[int, Number] | None = None,
    ) -> Graph:
        """The graph of call(levels, *rows of the condition) for a sample image and the row of that number."""
        rows = [self._leaves[k][b : b + 1] for k in self._rows]
        try:
            with self.kept():
                return trace(call, self.model, self.samples[b : b + 1], rows, like, answers)
        except Unsupported:
            raise
        except Exception as error:  # the model runs on two images, but not on one, or not under the recorder
            raise Unsupported(f"tracing one image fails: {type(error).__name__}: {error}") from error

    def _checked(self, call: Callable[..., Tensor], images: list[int]) -> Graph:
        """The graph of the first image; the same for the second, and as in a batch of these images."""
        graph = self._traced(call, 0)
        graphs = graph, self._traced(call, 1, graph)
        _check_same(graphs, self._of_two if images == [0, 1] else self._together(images))
        return graph

    @torch.no_grad()
    def _together(self, images: list[int]) -> Tensor:
        """The output for some of the sample images, each with a row of the condition."""
        rows = [self._leaves[k][[b % 2 for b in images]] for k in self._rows]
        with self.kept():
            return self._call(self.samples[images], *rows)


def check_output(found: Any) -> None:
    if not isinstance(found, Tensor):
        raise TypeError(
            f"model must return a tensor of parameters, got {type(found).__name__}: output= picks it out of what the "
            "model returns"
        )


def _refuses(error: BaseException) -> bool:
    """Whether Python code has raised an error itself, as an `assert` does, or the code is none for what it is given, as
    where a layer gets None. Other errors of PyTorch's may come from numbers that do not fit together."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised = trace is not None and trace.tb_frame.f_code.co_code[trace.tb_lasti] == RAISE
    return raised or isinstance(error, (TypeError, AttributeError))


def _check_same(graphs: Sequence[Graph], whole: Tensor) -> None:
    """The same operations for both images, each by itself as in a batch of both."""
    first, second = graphs
    if not same_operations(first, second):
        raise Unsupported("the model computes in another way for other values of its input")
    precise = not any(value.data.dtype in HALF for value in first.values)
    for k, graph in enumerate(graphs):
        alone, together = graph.result, whole[k].cpu()
        scale = together[together.isfinite()].abs().max() if together.isfinite().any() else 0
        tolerance = 1e-3 * float(scale) + 1e-5 if precise else 0.1 * float(scale)
        if alone.numel() != together.numel():
            numbers = f"{alone.numel()} numbers for one image and {together.numel()} for each of two"
            raise Unsupported(f"the model returns {numbers}", first)
        if not torch.allclose(alone.reshape(together.shape), together, atol=tolerance, rtol=0, equal_nan=True):
            raise Unsupported("an image's output depends on what else is in its batch", first)
