"""Takes a function of tensors; gives the `Graph` of one run of it, recorded operator by operator.

A dispatch mode sees every ATen operator with its tensors. Views, copies and writes in place need no operation of their
own: for every storage the recorder knows which value each of its elements holds, so that slices, permutations, padding,
and loops that fill a tensor piece by piece all end up in the operands of the computations that read them.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import flex_attention, math_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.sampling.trace.decompositions import LOOKUPS, WRITTEN_OUT, convolution_by_patches
from fastgen.sampling.trace.fourier import convolution, spectrum_of
from fastgen.sampling.trace.graph import Graph, Map, Operand, Unsupported, Value, map_arguments, name_of
from fastgen.sampling.trace.movement import moved
from fastgen.sampling.trace.operators import (
    DECOMPOSED,
    METADATA_ONLY,
    SAME_ELEMENTS,
    SCANS,
    SHAPE_ONLY,
    WHOLE,
    Rewrites,
    is_seeded,
    single_mask,
    written_arguments,
)
from fastgen.sampling.trace.storages import Storages, copied_to_cpu, storage_of, tensors_in

aten = torch.ops.aten
Number = bool | int | float
BY_FOURIER = "convolutions by Fourier transforms are computed as convolutions"


def trace(
    run: Callable[..., Tensor],
    modules: nn.Module | None,
    levels: Tensor,
    conditions: Sequence[Tensor] = (),
    like: Graph | None = None,
    answers: Mapping[int, Number] | None = None,
) -> Graph:
    """The graph of run(levels, *conditions), all of one image.

    Args:
        run: the model as a function.
        modules: the model, after whose modules operations are named.
        levels, conditions: its inputs.
        like: of another run, with which this one shares constants that are equal.
        answers: what some of the model's reads of numbers give, see `Graph.reads`, in the place of the numbers.

    Raises:
        RandomNumbers: the output depends on random numbers.
        Unsupported: the run uses what cannot be recorded.
    """
    recorder = _Recorder(like, answers or {})
    recorder.enter("levels", levels)
    for leaf in conditions:
        recorder.enter("condition", leaf)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_plain_torch())
        if modules is not None:
            stack.enter_context(recorder.naming(modules))
        stack.enter_context(Rewrites(recorder.storages.tracked))
        stack.enter_context(recorder)
        output = run(levels, *conditions)
    if not isinstance(output, Tensor):
        raise Unsupported(f"the model returns a {type(output).__name__}")
    found = recorder.storages.operand(output)
    recorder.graph.output = found if found.map is not None else recorder.copied(found)
    recorder.graph.leave_out_unused()
    recorder.graph.result = output.detach().cpu()
    return recorder.graph


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    """Attention and LSTMs by operators that are known, nothing compiled."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            sdpa_kernel([SDPBackend.MATH]),
            torch.backends.mkldnn.flags(enabled=False),
            # Without torch._dynamo, which takes a second to import, nothing has been compiled yet.
            torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


class _Recorder(TorchDispatchMode):
    def __init__(self, like: Graph | None, answers: Mapping[int, Number]) -> None:
        super().__init__()
        self.answers = answers
        self.graph = Graph()
        self.storages = Storages(self.graph, like)
        self.modules: list[str] = []
        self.lent: dict[int, list[Value]] = {}  # a storage -> values whose data lie there, until it is written

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """The compiler runs eagerly meanwhile; telling it to skip this class would import it, which takes a second."""
        return False

    # --- values

    def enter(self, kind: str, tensor: Tensor) -> None:
        value = self.graph.add(Value(kind, tuple(tensor.shape), copied_to_cpu(tensor)))
        self.storages.define(tensor, self.graph.whole(value))

    def add(self, op: Any, data: Tensor, args: Sequence[Any], kwargs: Any = None, output: int = 0) -> Operand:
        """A new value, read whole."""
        data = data.detach().cpu().contiguous()
        value = Value("computed", tuple(data.shape), data, op, tuple(args), kwargs or {}, output, self.module)
        self.lent.setdefault(storage_of(data), []).append(value)
        return self.graph.whole(self.graph.add(value))

    def copied(self, operand: Operand) -> Operand:
        """The same elements as a value of its own, where an operation needs its operand in one piece."""
        return self.add(aten.clone.default, self.graph.data_of(operand), (operand,))

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
        variable = any(self.storages.tracked(tensor) for tensor in tensors_in((args, kwargs)))
        name = name_of(func)
        if variable:
            with self:  # the simpler operators come here, too
                found = self.by_simpler_operators(func, name, args, kwargs)
            if found is not NotImplemented:
                return found
        if torch.Tag.nondeterministic_seeded in func.tags and (variable or not is_seeded(func, args, kwargs)):
            return self.record_random(func, args, kwargs)
        if name in METADATA_ONLY:
            return func(*args, **kwargs)
        written = written_arguments(func, args, kwargs)
        for value in (value for tensor in written for value in self.lent.pop(storage_of(tensor), ())):
            value.data = value.data.clone()
        if not variable or name in SHAPE_ONLY:
            out = func(*args, **kwargs)
            if "empty" in name and isinstance(out, Tensor) and out.numel():
                out.zero_()  # what happens to lie there is no constant
            for tensor in written:
                if self.storages.tracked(tensor):
                    self.storages.write(tensor, self.graph.whole(self.storages.constant(tensor)))
            return out
        if written:
            return self.record_write(func, name, written, args, kwargs)
        if name == "convolution":  # the fast implementation is what an LSTM must not take
            with torch.backends.mkldnn.flags(enabled=True):
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if func is aten.view.dtype:  # other numbers, though in the same place
            if out.shape != args[0].shape:
                raise Unsupported(f"view takes {args[0].dtype} for {out.dtype}, of another size")
            out = out.clone()
        if name in ("_local_scalar_dense", "is_nonzero", "equal"):
            self.graph.reads.append(out)
            return self.answers.get(len(self.graph.reads) - 1, out)
        results = tensors_in(out)
        if not results or not all(self.storages.tracked(tensor) for tensor in results):  # else it is a view
            self.record(func, name, args, kwargs, out)
        return out

    def by_simpler_operators(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The result of an operator that is written out as others; NotImplemented where it is not."""
        if name in WRITTEN_OUT and (found := WRITTEN_OUT[name](func, *args, **kwargs)) is not NotImplemented:
            return found
        # Such an operator comes here whole under inference_mode, and out of what is written out.
        if _is_composite(func):
            return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if func in DECOMPOSED and not func._schema.is_mutable:
            return DECOMPOSED[func](*args, **kwargs)
        if name == "native_batch_norm":
            return DECOMPOSED[aten.native_batch_norm.default](*args, **kwargs)
        if name == "_convolution":  # as traced by torch.jit
            return aten.convolution.default(*args[:9])
        if name == "convolution" and self.storages.tracked(args[1]):
            return convolution_by_patches(*args)
        if name in LOOKUPS and not self.storages.tracked(args[0]):
            return LOOKUPS[name](*args)
        return NotImplemented

    def recorded(self, arguments: Any) -> Any:
        return map_arguments(arguments, self.storages.operand, Tensor)

    def record(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        recorded_args, recorded_kwargs = self.recorded(args), self.recorded(kwargs)
        if name in SAME_ELEMENTS:
            source = recorded_args[1] if name == "copy" else recorded_args[0]
            if source.shape == tuple(out.shape) and source.dtype == out.dtype:
                self.storages.define(out, source)
                return
            if name == "copy":
                recorded_args, func = (source,), aten.clone.default
        found = moved(self.storages, func, name, args, kwargs, recorded_args, out)
        if found is not None:
            self.storages.define(out, found)
            return
        recorded_args = self.in_one_piece(name, recorded_args)
        if name == "_fft_c2r" and self.record_convolution(recorded_args, out):
            return
        if name in SCANS:
            self.record_scan(func, name, args, recorded_args, out)
            return
        for k, tensor in enumerate(out if isinstance(out, (list, tuple)) else (out,)):
            if isinstance(tensor, Tensor):
                self.storages.define(tensor, self.add(func, tensor, recorded_args, recorded_kwargs, k))
            else:
                raise Unsupported(f"{name} gives a {type(tensor).__name__}")

    def record_convolution(self, args: Any, out: Tensor) -> bool:
        """Whether an inverse Fourier transform is the end of a causal convolution; it is recorded as that then."""

        def tensor_of(operand: Operand) -> Tensor:
            with torch._C._DisableTorchDispatch():
                tensor = self.graph.data_of(operand).clone(memory_format=torch.contiguous_format)
            self.storages.define(tensor, operand)
            return tensor

        spectrum, (_, dims, norm, n) = spectrum_of(args[0]), args
        if spectrum is None or len(dims) > 1:
            return False
        with self:
            found = convolution(spectrum, dims[0] % out.dim() - out.dim(), norm, n, tensor_of)
        if found is None:
            return False
        self.storages.define(out, self.storages.operand(found))
        if BY_FOURIER not in self.graph.remarks:
            self.graph.remarks.append(BY_FOURIER)
        return True

    def record_random(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What is drawn is a value of its own: some models also return a sample, which nobody asks for here."""
        out = func(*args, **kwargs)
        for k, tensor in enumerate(tensors_in(out)):
            data = copied_to_cpu(tensor)
            value = self.graph.add(Value("random", tuple(data.shape), data, func, output=k, module=self.module))
            self.storages.write(tensor, self.graph.whole(value))
        return out

    def record_scan(self, func: Any, name: str, args: Any, recorded_args: Any, hidden: Tensor) -> None:
        """The value of a scan holds its hidden and its cell states, in the dtype of the latter; the model sees the
        former."""
        with torch._C._DisableTorchDispatch():
            given = args[: 3 if name == "diagonal_lstm" else 2]  # without the choice of implementation
            _, _, cell = getattr(torch.ops.fastgen, f"{name}_saving")(*given, False)
        states = torch.stack((hidden.to(cell.dtype), cell), 1)
        whole = self.add(func, states, recorded_args).map
        assert whole is not None
        seen = Map(whole.value, tuple(hidden.shape), whole.start, tuple(whole.steps[d] for d in (0, 2, 3, 4)))
        operand = Operand(self.graph, seen.shape, map=seen)
        if hidden.dtype != cell.dtype:
            operand = self.add(aten._to_copy.default, hidden, (operand,), {"dtype": hidden.dtype})
        self.storages.define(hidden, operand)

    def record_write(self, func: Any, name: str, written: list[Tensor], args: Any, kwargs: Any) -> Any:
        """An operator in place is the one that gives a new tensor, followed by a write."""
        target, plain = args[0], name.removesuffix("_").replace("_index_put_impl", "index_put")
        new = getattr(aten, plain, None)  # PyTorch chooses the overload: those of pow have other names
        if len(written) != 1 or written[0] is not target or not name.endswith("_") or new is None:
            raise Unsupported(f"{name} writes into its arguments")
        if name in ("zero_", "fill_") and not self.storages.tracked(args[-1] if name == "fill_" else None):
            func(*args, **kwargs)
            self.storages.write(target, self.graph.whole(self.storages.constant(target)))
            return target
        mask = single_mask(*args) if plain == "index_put" else None
        with self:
            if name == "copy_":
                found = args[1].expand(target.shape)
            elif mask is not None and self.storages.tracked(mask):  # x[mask] = number
                found = aten.where.self(mask, args[2], target)
            else:
                found = new(*args[:4] if plain == "index_put" else args, **kwargs)
            if found.dtype != target.dtype:
                found = aten._to_copy.default(found, dtype=target.dtype)
        self.storages.write(target, self.storages.operand(found))
        with torch._C._DisableTorchDispatch():
            return target.copy_(found)

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


@flex_attention.py_impl(_Recorder)
def _flex_attention(mode: _Recorder, *args: Any) -> Any:
    """Written out as products and a softmax, scores changed and masked in between."""
    with mode:
        return math_attention(*args)
