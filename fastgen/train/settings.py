"""The numbers of a training run, checked."""

import math
from dataclasses import dataclass

FLOOR = 0.01  # of the peak learning rate, at the end of the cosine and beyond
SHORTEST_DECAY = 2000  # steps; see Settings.decay_steps


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: optimizer steps in all.
        batch_size: images a step; all training images where there are fewer.
        lr: peak learning rate.
        warmup: steps over which the learning rate rises from 0.
        decay_steps: steps over which it falls to a hundredth; None becomes `steps`, but at least 2,000, so that a short
            run is the beginning of a longer one and can be resumed as such.
        weight_decay: of AdamW, on weights of two or more dimensions.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights, less in the first steps.
        validate_every: steps from one validation to the next; each also saves the run.
        patience: validations without improvement before training stops; 0 never stops.
        max_seconds: wall time after which training stops at the next step; None for none.
        seed: of the order of the images, dropout and noise. The weights are as the model has them.

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

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("validate_every", 1), ("patience", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
        if self.decay_steps is None:
            object.__setattr__(self, "decay_steps", max(self.steps, SHORTEST_DECAY))
        elif not isinstance(self.decay_steps, int) or self.decay_steps < 1:
            raise ValueError(f"decay_steps must be an int >= 1 or None, got {self.decay_steps!r}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number >= 0, got {self.weight_decay!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be an int in 0..2**31-1, got {self.seed!r}")

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        assert self.decay_steps is not None  # since __post_init__
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.decay_steps)))
        return self.lr * rise * (FLOOR + (1 - FLOOR) * fall)
