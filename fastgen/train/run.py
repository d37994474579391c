"""`Run`: everything that changes during training, in one object that can be saved and restored."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fastgen import checkpoint, distributed
from fastgen.distributed import mix
from fastgen.train import parallel
from fastgen.train.batches import Data
from fastgen.train.measure import Loss, mean_loss, unit
from fastgen.train.settings import Settings

Optimizer = torch.optim.Optimizer | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Schedule = Callable[[int], float] | LRScheduler


class Run:
    """A model, its averaged weights, its optimizer, and the losses so far. The random numbers of a step depend on the
    seed of the settings, the number of the step and the process, so that there is no random state to save.

    Args:
        augment, optimizer, schedule: as in `train`.

    Attributes:
        step: optimizer steps taken.
        validated: the step of the latest scheduled validation.
        best: lowest loss of a scheduled validation, in the unit `metric`; infinite before the first.
        best_weights: the averaged weights at that validation, on the CPU.
        stale: number of validations since then.
        rows: the lines of metrics.jsonl.
        loss_sum, loss_count: sum and number of the training losses since the last row; the sum is over this process's
            share of the images.
    """

    def __init__(
        self,
        model: Any,
        data: Data,
        folder: Path,
        settings: Settings,
        device: torch.device,
        *,
        augment: Callable[[Tensor], Tensor] | None = None,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.model = model.to(device).train()
        self.data, self.folder, self.settings, self.device, self.augment = data, folder, settings, device, augment
        x, _ = data.first()
        self.metric, self.factor = unit(model, x.shape[1:], x.is_floating_point())
        self.configuration = checkpoint.configuration(model)
        self.average = copy.deepcopy(model).eval()
        if parallel.sharded(settings):
            for part in (self.model, self.average):
                parallel.shard(part)
        self.loss = Loss(self.model)
        self._training_loss = parallel.for_training(self.loss, settings, device)
        self.schedule = schedule
        self.optimizer = _optimizer(self.model, settings, optimizer)
        if isinstance(schedule, LRScheduler) and schedule.optimizer is not self.optimizer:
            raise ValueError("schedule must be an LRScheduler of the optimizer that is given as `optimizer`")
        self._own_rates = optimizer is not None and schedule is None
        self.amp = _autocast(settings.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.step = self.validated = self.stale = 0
        self.best = float("inf")
        self.best_weights: dict[str, Tensor] = {}
        self.rows: list[dict[str, float]] = []
        self.loss_sum = torch.zeros((), device=device)
        self.loss_count = 0
        self.rate = 0.0  # learning rate of the latest step
        self.gradient_norm = torch.zeros((), device=device)

    # --- one step

    def _batch(self) -> tuple[Tensor, Tensor | None, float]:
        """This process's images and classes, and their fraction of the step's images. If there are fewer images than
        processes, some processes compute one image with the fraction 0."""
        x, labels = self.data.train.batch(self.step, self.settings.batch_size, self.settings.seed)
        part = distributed.shard(len(x))
        share = (part.stop - part.start) / len(x)
        part = part if share else slice(0, 1)
        x, labels = self.loss.batch((x[part], None if labels is None else labels[part]), self.device)
        return x if self.augment is None else self.augment(x), labels, share

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        if callable(self.schedule):
            return self.schedule(self.step)
        if self.schedule is not None or self._own_rates:
            return self.optimizer.param_groups[0]["lr"]
        return self.settings.learning_rate(self.step)

    def train_step(self) -> None:
        """One step of the optimizer and of the averaged weights."""
        torch.manual_seed(mix(self.settings.seed, self.step, distributed.rank()))
        x, labels, share = self._batch()
        rate = self.learning_rate()
        if callable(self.schedule) or not (self.schedule or self._own_rates):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        batch = (x,) if labels is None else (x, labels)
        cached = not self.settings.cuda_graph  # a graph cannot be captured with autocast's cache of weights
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None, cache_enabled=cached):
            loss = self._training_loss(*batch, **self.settings.loss_options(self.step))
        self.optimizer.zero_grad()
        self.scaler.scale(loss * (share * distributed.world_size())).backward()  # gradients become means over processes
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.gradient_norm = parallel.whole(norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if isinstance(self.schedule, LRScheduler):
            self.schedule.step()
        self.step += 1
        self._update_average()
        self.loss_sum += loss.detach() * share
        self.loss_count += 1
        self.rate = rate

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(
            self.settings.ema, (1 + self.step) / (10 + self.step)
        )  # smaller at first: initial weights fade fast
        torch._foreach_lerp_(parallel.local(self.average), parallel.local(self.model), 1 - decay)
        for average, value in zip(self.average.buffers(), self.model.buffers(), strict=True):
            average.copy_(value)

    # --- losses

    def log(self) -> float:
        """Adds a row with the mean training loss since the last row, and returns it. Waits for the device.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = float(distributed.merged(self.loss_sum)) / self.loss_count * self.factor
        self._check_finite(loss)
        self.loss_sum.zero_()
        self.loss_count = 0
        row = {"step": self.step, f"train_{self.metric}": loss, "learning_rate": self.rate}
        self.rows.append({**row, "gradient_norm": float(self.gradient_norm)})
        return loss

    def validation_is_due(self) -> bool:
        return self.step % self.settings.validate_every == 0 and self.step > self.validated

    def measure(self, stop: Callable[[], bool] = lambda: False) -> float:
        """The validation loss of the averaged weights. Without validation images this is minus the step, so that the
        latest weights count as the best. Changes nothing.

        Raises:
            FloatingPointError: the loss is not finite.
            Interrupted: `stop` returned True; see `mean_loss`.
        """
        if self.data.validation is None:
            return -float(self.step)
        value = mean_loss(self.average, self.data.validation, self.device, seed=self.settings.seed, stop=stop)
        self._check_finite(value * self.factor)
        return value * self.factor

    def record(self, value: float) -> None:
        """Records the loss of a scheduled validation as a row, and the averaged weights if they are the best."""
        self.validated = self.step
        self.add_validation(value)
        if value < self.best:
            self.best, self.stale = value, 0
            self.best_weights = {name: tensor.cpu().clone() for name, tensor in self.averaged().items()}
        else:
            self.stale += 1

    def add_validation(self, value: float) -> None:
        """Adds a row with a validation loss."""
        if self.data.validation is not None:
            self.rows.append({"step": self.step, f"validation_{self.metric}": value})

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights as whole tensors. All processes must call it."""
        return parallel.whole(self.average.state_dict())

    def _check_finite(self, loss: float) -> None:
        if not abs(loss) < float("inf"):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.step}: try a lower learning rate (a saved run resumes with --lr)"
            )

    def check_weights(self) -> None:
        """Raises FloatingPointError if a weight is not finite: the loss of the next step will not be either."""
        for name, weight in self.model.named_parameters():
            if weight.requires_grad and not bool(parallel.whole(weight.detach()).isfinite().all()):
                raise FloatingPointError(
                    f"{name} is not finite at step {self.step}: try a lower learning rate (a saved run resumes with "
                    "--lr)"
                )

    def over(self) -> str:
        """The reason why the run is over; "" if it is not."""
        if self.validation_is_due():
            return ""
        if self.settings.patience and self.stale >= self.settings.patience:
            return "no improvement"
        return "finished" if self.step >= self.settings.steps else ""


def _optimizer(model: nn.Module, settings: Settings, given: Optimizer | None) -> torch.optim.Optimizer:
    """The optimizer that was given, or AdamW. Raises ValueError if no parameter of the model can be trained, or if the
    given optimizer has other parameters."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model must have parameters that require a gradient, this {type(model).__name__} has none")
    if given is not None:
        optimizer = given if isinstance(given, torch.optim.Optimizer) else given(model.parameters())
        trained = set(map(id, model.parameters()))
        foreign = sum(id(tensor) not in trained for group in optimizer.param_groups for tensor in group["params"])
        if foreign:
            raise ValueError(
                f"optimizer must be of the model's own parameters, {foreign} of its tensors are not: make it after the "
                "model has its final form, or give a function that makes it from the parameters"
            )
        return optimizer
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    biases = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": weights, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr)


def _autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast; None for no autocast."""
    if precision == "bfloat16":
        return torch.bfloat16
    if precision == "float32" or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
