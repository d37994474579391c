"""Records one run of a model, operator by operator, into a `Graph`.

A dispatch mode sees every ATen operator with its tensors. Views, copies and writes in place need no operation of their
own: for every storage the recorder knows which value each of its elements holds, so that slices, permutations, padding,
and loops that fill a tensor piece by piece all end up in the operands of the computations that read them.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen.sampling.trace.decompositions import WRITTEN_OUT, convolution_by_patches
from fastgen.sampling.trace.graph import Graph, Map, Operand, Unsupported, Value
from fastgen.sampling.trace.operators import (
    DECOMPOSED,
    METADATA_ONLY,
    MOVEMENT,
    SCANS,
    SHAPE_ONLY,
    SOURCES,
    WHOLE,
    Rewrites,
    is_seeded,
    is_written,
    single_mask,
)
from fastgen.sampling.trace.storages import Storage, place_in

aten = torch.ops.aten


def trace(
    run: Callable[..., Tensor], modules: nn.Module | None, levels: Tensor, conditions: Sequence[Tensor] = ()
) -> Graph:
    """The graph of run(levels, *conditions), all of one image.

    Raises:
        Unsupported: the run uses what cannot be recorded, random numbers for example.
    """
    recorder = _Recorder()
    recorder.enter("levels", levels)
    for leaf in conditions:
        recorder.enter("condition", leaf)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(_plain_attention())
        if modules is not None:
            stack.enter_context(recorder.naming(modules))
        stack.enter_context(Rewrites())
        stack.enter_context(recorder)
        output = run(levels, *conditions)
    if not isinstance(output, Tensor):
        raise Unsupported(f"the model returns a {type(output).__name__}")
    found = recorder.operand(output)
    recorder.graph.output = found if found.map is not None else recorder.copied(found)
    return recorder.graph


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()
        self.storages: dict[int, Storage] = {}
        self.alive: list[Tensor] = []  # storages are known by address, which must not be used again
        self.modules: list[str] = []
        self.constants: dict[Any, Value] = {}

    # --- values and operands

    def enter(self, kind: str, tensor: Tensor) -> None:
        value = self.graph.add(Value(kind, tuple(tensor.shape), _kept(tensor)))
        self.define(tensor, self.whole(value))

    def whole(self, value: Value) -> Operand:
        return Operand(self.graph, value.shape, map=Map.identity(value))

    def define(self, tensor: Tensor, operand: Operand) -> None:
        """From now on the tensor's storage holds the operand's elements, and nothing else."""
        self.alive.append(tensor)
        offset = int(tensor.storage_offset())
        self.storages[_key(tensor)] = Storage(operand, tuple(tensor.shape), tensor.stride(), offset)

    def tracked(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and _key(tensor) in self.storages

    def constant(self, tensor: Tensor) -> Value:
        """Weights are used again and again in loops: what is the same tensor with the same contents is one value."""
        key = (_key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        known = self.constants.get(key)
        if known is None or not torch.equal(known.data, tensor.cpu()):
            self.alive.append(tensor)
            known = self.graph.add(Value("constant", tuple(tensor.shape), _kept(tensor)))
            self.constants[key] = known
        return known

    def operand(self, tensor: Tensor) -> Operand:
        """What the tensor holds at this moment."""
        shape = tuple(tensor.shape)
        if not self.tracked(tensor):
            return self.whole(self.constant(tensor))
        storage = self.storages[_key(tensor)]
        place = Storage(storage.operand, shape, tensor.stride(), int(tensor.storage_offset()))
        if storage.operand.map is not None and storage == place:
            return storage.operand
        if storage.operand.map is not None:
            decoded = place_in(tensor, storage)
            if decoded is not None:
                start, steps = decoded
                inner = storage.operand.map
                composed = Map(
                    inner.value,
                    shape,
                    tuple(
                        inner.start[k] + sum(s * inner.steps[d][k] for d, s in enumerate(start)) for k in _dims(inner)
                    ),
                    tuple(
                        tuple(sum(s * inner.steps[d][k] for d, s in enumerate(step)) for k in _dims(inner))
                        for step in steps
                    ),
                )
                return Operand(self.graph, shape, map=composed)
        flat = self.flat_ids(tensor)
        ids = flat.as_strided(shape, tensor.stride(), tensor.storage_offset()).contiguous()
        return Operand(self.graph, shape, ids=ids)

    def flat_ids(self, tensor: Tensor) -> Tensor:
        """Number of the element in every place of the tensor's storage."""
        storage = self.storages[_key(tensor)]
        if storage.operand.ids is not None and storage.strides == (1,):
            return storage.operand.ids
        room = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = torch.zeros(room, dtype=torch.long)
        flat.as_strided(storage.shape, storage.strides, storage.offset).copy_(storage.operand.element_ids())
        return flat

    def write(self, tensor: Tensor, operand: Operand) -> None:
        """The operand's elements, broadcast, take the place of what the tensor held."""
        room = tensor.untyped_storage().nbytes() // tensor.element_size()
        if operand.shape == tuple(tensor.shape) and tensor.numel() == room and 0 not in tensor.stride():
            self.define(tensor, operand)
            return
        if not self.tracked(tensor):
            base = tensor.as_strided((room,), (1,), 0).clone()
            base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()  # written already
            value = self.constant(base)
            flat = self.whole(value).element_ids().view(-1)
        else:
            flat = self.flat_ids(tensor).clone()
        region = flat.as_strided(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        region.copy_(operand.element_ids().expand(tensor.shape))
        self.alive.append(tensor)
        self.storages[_key(tensor)] = Storage(Operand(self.graph, (room,), ids=flat), (room,), (1,), 0)

    def copied(self, operand: Operand) -> Operand:
        """The same elements as a value of its own, where an operation needs its operand in one piece."""
        data = self.graph.data_of(operand).contiguous()
        value = Value("computed", operand.shape, data, aten.clone.default, (operand,), module=self.module)
        return self.whole(self.graph.add(value))

    @property
    def module(self) -> str:
        return self.modules[-1] if self.modules else ""

    @contextlib.contextmanager
    def naming(self, modules: nn.Module) -> Iterator[None]:
        """Values remember the module that computed them."""

        def leave(*_: Any) -> None:
            self.modules.pop()

        handles: list[Any] = []
        for name, module in modules.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.modules.append(name)))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        variable = any(self.tracked(tensor) for tensor in tensors)
        name = func._schema.name.split("::")[1]
        if variable and name in WRITTEN_OUT:
            with self:
                found = WRITTEN_OUT[name](func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        if variable and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # comes here whole under inference_mode, and out of what is written out
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and (variable or not is_seeded(func, args, kwargs)):
            raise Unsupported(f"{name} draws random numbers in the model's forward pass: call model.eval()")
        if variable and func in DECOMPOSED and not func._schema.is_mutable:
            with self:
                return DECOMPOSED[func](*args, **kwargs)
        if name == "_convolution" and variable:  # as traced by torch.jit
            with self:
                return aten.convolution.default(*args[:9])
        if name == "convolution" and self.tracked(args[1]):
            with self:
                found = convolution_by_patches(*args)
            if found is not NotImplemented:
                return found
        if name in METADATA_ONLY:
            return func(*args, **kwargs)
        if name == "native_batch_norm" and variable:
            with self:
                return DECOMPOSED[aten.native_batch_norm.default](*args, **kwargs)
        written = [
            args[i] for i, argument in enumerate(func._schema.arguments) if i < len(args) and is_written(argument)
        ]
        written += [kwargs[a.name] for a in func._schema.arguments if a.name in kwargs and is_written(a)]
        if not variable or name in SHAPE_ONLY:
            out = func(*args, **kwargs)
            if "empty" in name and isinstance(out, Tensor) and out.numel():
                out.zero_()  # what happens to lie there is no constant
            for tensor in written:
                if self.tracked(tensor):
                    self.write(tensor, self.whole(self.constant(tensor)))
            return out
        if written:
            return self.record_write(func, name, written, args, kwargs)
        out = func(*args, **kwargs)
        results = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        if not results or not all(self.tracked(tensor) for tensor in results):  # else it is a view
            self.record(func, name, args, kwargs, out)
        return out

    def record(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        recorded_args, recorded_kwargs = (_map_tensors(one, self.operand) for one in (args, kwargs))
        if name in ("clone", "_to_copy", "contiguous", "lift_fresh_copy", "copy", "alias_copy", "view_copy"):
            source = recorded_args[1] if name == "copy" else recorded_args[0]
            if source.shape == tuple(out.shape) and self.graph_dtype(source) == out.dtype:
                self.define(out, source)
                return
            if name == "copy":
                recorded_args, func = (source,), aten.clone.default
        moved = self.moved(func, name, args, kwargs, recorded_args, out) if name in MOVEMENT else None
        if moved is not None:
            self.define(out, moved)
            return
        recorded_args = self.in_one_piece(name, recorded_args)
        if name in SCANS and out.dtype in (torch.float32, torch.float64):
            self.record_scan(func, name, args, recorded_args, out)
            return
        for k, tensor in enumerate(out if isinstance(out, (list, tuple)) else (out,)):
            if not isinstance(tensor, Tensor):
                if name not in ("_local_scalar_dense", "is_nonzero", "equal"):
                    raise Unsupported(f"{name} gives a {type(tensor).__name__}")
                if "reads values of its input" not in self.graph.remarks:
                    self.graph.remarks.append("reads values of its input")
                continue
            data = _kept(tensor)
            value = Value(
                "computed", tuple(tensor.shape), data, func, tuple(recorded_args), recorded_kwargs, k, self.module
            )
            self.define(tensor, self.whole(self.graph.add(value)))

    def record_scan(self, func: Any, name: str, args: Any, recorded_args: Any, hidden: Tensor) -> None:
        """The value of a scan holds its hidden and its cell states; the model sees the former."""
        with torch._C._DisableTorchDispatch():
            given = args[: 3 if name == "diagonal_lstm" else 2]  # without the choice of implementation
            _, _, cell = getattr(torch.ops.fastgen, f"{name}_saving")(*given, False)
        data = _kept(torch.stack((hidden, cell), 1))
        value = self.graph.add(
            Value("computed", tuple(data.shape), data, func, tuple(recorded_args), module=self.module)
        )
        whole = Map.identity(value)
        steps = tuple(whole.steps[d] for d in (0, 2, 3, 4))
        seen = Map(value, tuple(hidden.shape), whole.start, steps)
        self.define(hidden, Operand(self.graph, seen.shape, map=seen))

    def graph_dtype(self, operand: Operand) -> torch.dtype:
        value = operand.map.value if operand.map is not None else operand.values[-1]
        return value.data.dtype

    def record_write(self, func: Any, name: str, written: list[Tensor], args: Any, kwargs: Any) -> Any:
        """An operator in place is the one that gives a new tensor, followed by a write."""
        if len(written) != 1 or written[0] is not args[0]:
            raise Unsupported(f"{name} writes into its arguments")
        target = args[0]
        if (
            name in ("index_put_", "_index_put_impl_")
            and (mask := single_mask(*args)) is not None
            and self.tracked(mask)
        ):
            with self:  # x[mask] = number
                chosen = aten.where.self(mask, args[2], target)
            self.write(target, self.operand(chosen))
            return func(*args, **kwargs)
        recorded_args, recorded_kwargs = (_map_tensors(one, self.operand) for one in (args, kwargs))
        out = func(*args, **kwargs)
        if name in ("zero_", "fill_") and not self.tracked(args[-1] if name == "fill_" else None):
            self.write(target, self.whole(self.constant(target)))
            return out
        if name == "copy_":
            source = recorded_args[1]
            if self.graph_dtype(source) != target.dtype:
                data = self.graph.data_of(source).to(target.dtype).contiguous()
                value = Value(
                    "computed", source.shape, data, aten._to_copy.default, (source,), {"dtype": target.dtype},
                    module=self.module,
                )  # fmt: skip
                source = self.whole(self.graph.add(value))
            self.write(target, source)
            return out
        packet = getattr(aten, name.removesuffix("_"), None)
        overload = getattr(packet, func._overloadname, None) if packet is not None else None
        if not name.endswith("_") or overload is None:
            raise Unsupported(f"{name} writes into its arguments")
        if name.removesuffix("_") in MOVEMENT:
            moved = self.moved(overload, name.removesuffix("_"), args, kwargs, recorded_args, target)
            if moved is not None:
                self.write(target, moved)
                return out
        recorded_args = self.in_one_piece(name.removesuffix("_"), recorded_args)
        data = _kept(target)
        value = Value(
            "computed", tuple(target.shape), data, overload, tuple(recorded_args), recorded_kwargs, 0, self.module
        )
        self.write(target, self.whole(self.graph.add(value)))
        return out

    def moved(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], recorded_args: Sequence[Any], out: Tensor
    ) -> Operand | None:
        """The result of an operator that only moves elements; None where it does more (indices that are computed)."""
        if name == "constant_pad_nd":
            padded = self.padded(recorded_args, kwargs)
            if padded is not None:
                return padded
            recorded_args, kwargs = [*recorded_args, kwargs.get("value", 0)][:3], {}
        sources = SOURCES.get(name, (0,))
        rest = [one for k, one in enumerate(args) if k not in sources]
        if any(self.tracked(leaf) for leaf in tree_leaves((rest, kwargs))):
            return None
        if "reduce" in func._overloadname or (
            name == "index_put" and ([*args, False, False][3] or kwargs.get("accumulate"))
        ):
            return None  # sums
        changed: list[Any] = []
        for k, one in enumerate(recorded_args):
            if k not in sources:
                changed.append(_map_tensors(args[k], Tensor.cpu))
            elif isinstance(one, Operand):
                changed.append(one.element_ids())
            else:
                number = self.whole(self.constant(torch.tensor([one], dtype=out.dtype))) if one else None
                changed.append(0 if number is None else int(number.element_ids()))
        floats = name.startswith(("upsample", "_upsample", "im2col", "replication", "reflection"))
        if floats:  # these take no integers; float64 holds the numbers exactly
            changed[0] = changed[0].double()
        with torch._C._DisableTorchDispatch():
            ids = func(*changed, **_map_tensors(kwargs, Tensor.cpu))
        return Operand(self.graph, tuple(out.shape), ids=ids.long().contiguous())

    def padded(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Operand | None:
        source, pads = args[0], list(args[1])
        fill = args[2] if len(args) > 2 else kwargs.get("value", 0)
        if source.map is None or (fill != 0 and any(p > 0 for p in pads)):
            return None
        rank = len(source.shape)
        before, after = [0] * rank, [0] * rank
        for k in range(len(pads) // 2):
            before[rank - 1 - k], after[rank - 1 - k] = pads[2 * k], pads[2 * k + 1]
        wider = source.map.pad(before, after)
        return None if wider is None else Operand(self.graph, wider.shape, map=wider)

    def in_one_piece(self, name: str, args: Sequence[Any]) -> list[Any]:
        """Operands of what is no pointwise operation become values of their own where no map describes them."""
        args = list(args)
        if name == "convolution" and args[0].map is not None:
            # A transpose needs zeros around its input wherever its kernel reaches beyond it.
            around = [k * d for k, d in zip(args[1].shape[2:], args[5], strict=True)] if args[6] else list(args[4])
            pads = [0] * (len(args[0].shape) - len(around)) + around
            if args[0].map.pad(pads, pads) is None:
                args[0] = self.copied(args[0])
        whole = name in WHOLE
        return [self.copied(one) if isinstance(one, Operand) and one.map is None and whole else one for one in args]


def _kept(tensor: Tensor) -> Tensor:
    """The analysis is done on the CPU, wherever the model is."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _dims(inner: Map) -> range:
    return range(len(inner.start))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _map_tensors(arguments: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(arguments, Tensor):
        return change(arguments)
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(_map_tensors(one, change) for one in arguments)
    if isinstance(arguments, dict):
        return {key: _map_tensors(one, change) for key, one in arguments.items()}
    return arguments
