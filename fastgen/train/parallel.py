"""PyTorch's ways to run a training step: DistributedDataParallel, FSDP2 and CUDA graphs."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from fastgen import distributed
from fastgen.train.measure import Loss
from fastgen.train.settings import Settings


def sharded(settings: Settings) -> bool:
    """Whether the parameters are sharded over the processes of this job."""
    return settings.parallel == "fsdp" and distributed.active()


def shard(model: nn.Module) -> None:
    """Shards the model's parameters over the processes (FSDP2). `loss` and `log_prob` gather them for each pass."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # matters only for in-place operations
    fully_shard(model)
    for method in ("loss", "log_prob"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def for_training(loss: Loss, settings: Settings, device: torch.device) -> nn.Module:
    """Wraps the loss for training steps: as a CUDA graph, in DDP, or not at all. DDP's gradients are means over the
    processes."""
    if settings.cuda_graph:
        reason = _why_no_graph(settings, device)
        if not reason:
            return GraphedLoss(loss)
        warnings.warn(f"cuda_graph is not used: {reason}", stacklevel=4)
    if not distributed.active() or sharded(settings):
        return loss
    return DistributedDataParallel(loss)


def _why_no_graph(settings: Settings, device: torch.device) -> str:
    if device.type != "cuda":
        return f"it needs a CUDA device, the model is on {device.type}"
    if settings.loss_options(0):
        return "it cannot take beta or free_bits, which may change from step to step"
    return "it is for one process, there are several" if distributed.active() else ""


class GraphedLoss(nn.Module):
    """A loss whose forward and backward pass are captured as CUDA graphs at the first batch and replayed for all
    batches of the same shapes (`torch.cuda.make_graphed_callables`). Other batches run without graphs."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss
        self._replayed: Any = None
        self._shapes: list[torch.Size] = []

    def forward(self, *batch: Tensor) -> Tensor:
        shapes = [tensor.shape for tensor in batch]
        if not self._shapes:
            self._shapes = shapes
            self._capture(batch)
        if self._replayed is None or shapes != self._shapes:
            return self.loss(*batch)
        return self._replayed(*batch)

    def _capture(self, batch: tuple[Tensor, ...]) -> None:
        before = [buffer.clone() for buffer in self.loss.buffers()]
        try:
            # A new Loss of the same model: make_graphed_callables replaces its forward permanently.
            self._replayed = torch.cuda.make_graphed_callables(
                Loss(self.loss.model), tuple(tensor.clone() for tensor in batch), allow_unused_input=True
            )
        except RuntimeError as error:
            warnings.warn(f"cuda_graph is not used: the loss cannot be captured ({error})", stacklevel=2)
        with torch.no_grad():  # undo what the warm-up passes did to buffers (batch norm's running means)
            for buffer, value in zip(self.loss.buffers(), before, strict=True):
                buffer.copy_(value)


# --- gathering and sharding tensors: files hold whole tensors, whatever the number of processes


def whole(tree: Any) -> Any:
    """Gathers the sharded tensors in nested containers; other values are kept. All processes must call it."""
    return tree_map(lambda value: value.full_tensor() if _is_sharded(value) else value, tree)


def like(value: Any, parameter: Any) -> Any:
    """Shards a whole tensor like a parameter, if the parameter is sharded and has the same shape. Returns any other
    value unchanged."""
    if _is_sharded(parameter) and isinstance(value, Tensor) and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def load_model(model: nn.Module, state: dict[str, Any]) -> None:
    """Loads a state dict of whole tensors into a model that may be sharded."""
    ours = model.state_dict()
    model.load_state_dict({name: like(value, ours[name]) if name in ours else value for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a state dict of whole tensors into an optimizer whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        number: {key: like(value, parameters[number]) for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def local(model: nn.Module) -> list[Tensor]:
    """The parameters of a model; for a sharded model the parts that this process holds."""
    parameters: list[Any] = list(model.parameters())
    return [p.to_local() if _is_sharded(p) else p for p in parameters]


def _is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor. (The class takes long to import.)"""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")
