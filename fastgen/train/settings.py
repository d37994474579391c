"""The settings of a training run, checked."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

FLOOR = 0.01  # learning rate at the end of the cosine and after it, as a fraction of the peak
SHORTEST_DECAY = 2000  # steps; see Settings.decay_steps
PRECISIONS = ("auto", "float32", "bfloat16")
PARALLEL = ("ddp", "fsdp")
LEAST = {"steps": 1, "batch_size": 1, "warmup": 0, "validate_every": 1, "patience": 0, "beta_warmup": 0, "samples": 0}


@dataclass(frozen=True)
class Settings:
    """Settings of a training run.

    Attributes:
        steps: optimizer steps in all.
        batch_size: images in a step, over all processes; all training images if there are fewer. Ignored for a
            DataLoader, which has its own.
        lr: peak learning rate.
        warmup: steps over which the learning rate rises from 0 to the peak.
        decay_steps: steps over which it falls to a hundredth of the peak, along a cosine. None means `steps`, but at
            least 2,000, so that a short run is the beginning of a longer one and can be resumed as such.
        weight_decay: weight decay of AdamW, on parameters of two or more dimensions.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights; it is smaller in the first steps.
        validate_every: steps between validations; each validation also saves the run.
        patience: number of validations without improvement after which training stops; 0 never stops.
        max_seconds: wall time after which training stops at the next step; None for no limit.
        seed: seed of the order of the images, of dropout and of noise. It does not affect the initial weights, which
            are those of the model.
        beta: weight of the KL in the loss of a VAE (Higgins et al. 2017). Validation uses 1.
        beta_warmup: steps over which this weight rises from 0 (annealing).
        free_bits: minimum of the KL of each latent dimension in the loss of a VAE, nats.
        precision: "auto": autocast on CUDA GPUs to bfloat16, or float16 if they lack it, and float32 elsewhere;
            "float32"; "bfloat16". Validation uses float32.
        samples: number of images drawn into samples/ at each validation.
        parallel: how several processes share a model: "ddp", or "fsdp" (FSDP2, which shards parameters and optimizer).
        cuda_graph: True replays forward and backward pass as a CUDA graph; for batches of one shape on one GPU.

    Raises:
        ValueError: a value is out of its range; names it.
    """

    steps: int = 2000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 100
    decay_steps: int | None = None
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.995
    validate_every: int = 100
    patience: int = 10
    max_seconds: float | None = None
    seed: int = 0
    beta: float = 1.0
    beta_warmup: int = 0
    free_bits: float = 0.0
    precision: str = "auto"
    samples: int = 0
    parallel: str = "ddp"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
        if self.decay_steps is None:
            object.__setattr__(self, "decay_steps", max(self.steps, SHORTEST_DECAY))
        elif not _is_int(self.decay_steps) or self.decay_steps < 1:
            raise ValueError(f"decay_steps must be an int >= 1 or None, got {self.decay_steps!r}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < float(value) < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
        for name in ("weight_decay", "beta", "free_bits"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= float(value) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        if not _is_number(self.ema) or not 0 <= self.ema < 1:
            raise ValueError(f"ema must be a number in [0, 1), got {self.ema!r}")
        if self.max_seconds is not None and not (_is_number(self.max_seconds) and self.max_seconds >= 0):
            raise ValueError(f"max_seconds must be a number >= 0 or None, got {self.max_seconds!r}")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be an int in 0..2**31-1, got {self.seed!r}")
        for name, known in (("precision", PRECISIONS), ("parallel", PARALLEL)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not isinstance(self.cuda_graph, bool):
            raise ValueError(f"cuda_graph must be a bool, got {self.cuda_graph!r}")

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        assert self.decay_steps is not None  # __post_init__ has set it
        warmup = min(1.0, (step + 1) / max(1, self.warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.decay_steps)))
        return self.lr * warmup * (FLOOR + (1 - FLOOR) * cosine)

    def loss_options(self, step: int) -> dict[str, float]:
        """The keyword arguments of a VAE's loss at a step, counted from 0; empty if all have their defaults."""
        options = {}
        if self.beta != 1 or self.beta_warmup:
            options["beta"] = self.beta * min(1.0, step / max(1, self.beta_warmup)) if self.beta_warmup else self.beta
        if self.free_bits:
            options["free_bits"] = self.free_bits
        return options


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
