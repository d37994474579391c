"""A stand-in for CUDA graphs on a CPU, as strict as they are: a capture runs nothing, reads nothing, and each replay
runs what was captured over the same memory."""

import contextlib
import types

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen.kernels.sampler import machine


class RecordedGraph:
    """As `torch.cuda.CUDAGraph`: the operations of a capture, with the tensors that they read and wrote."""

    def __init__(self):
        self.calls = []
        self.replays = 0

    def replay(self):
        self.replays += 1
        for function, args, kwargs, made in self.calls:
            found = function(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(found), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


class _Capture(TorchDispatchMode):
    """While it is the `now`, kernels of the step machine are recorded like operations."""

    now = None

    def __init__(self, graph):
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function == torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._remember(value)
        self._remember(kwargs.get("out"))
        made = function(*args, **kwargs)
        self.graph.calls.append((function, args, kwargs, made))
        return made

    def _remember(self, tensor):
        if tensor is not None:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self.before.setdefault(tensor.untyped_storage()._cdata, (whole, whole.clone()))

    def __enter__(self):
        _Capture.now = self
        return super().__enter__()

    def __exit__(self, *error):
        _Capture.now = None
        super().__exit__(*error)
        for whole, before in self.before.values():
            whole.copy_(before)


def stand_in(monkeypatch):
    """Puts it in the place of `torch.cuda`'s; returns what was captured: (graph, pool, stream) each."""
    captured = []

    @contextlib.contextmanager
    def graph(made, pool=None, stream=None, capture_error_mode="global"):
        captured.append(types.SimpleNamespace(graph=made, pool=pool, stream=stream))
        with _Capture(made):
            yield

    launch = machine.launch

    def launched(*args):
        if _Capture.now is None:
            launch(*args)
        else:
            _Capture.now.graph.calls.append((launch, args, {}, None))

    monkeypatch.setattr(machine, "launch", launched)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("a stream of", device))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return captured
