"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sihe.core.errors import ConfigError


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up to `peak_lr`, then half a cosine down to `min_ratio * peak_lr` (Loshchilov and Hutter 2017).

    Steps count from 0. The last step of the warm-up and the first after it run at the peak; step `total_steps - 1`, and
    any later one, at the floor.
    """

    peak_lr: float
    warmup_steps: int
    total_steps: int
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not (self.peak_lr > 0 and math.isfinite(self.peak_lr)):
            raise ConfigError(f"peak_lr is a positive number, got {self.peak_lr!r}", key="peak_lr")
        if self.total_steps < 1:
            raise ConfigError(f"total_steps is at least 1, got {self.total_steps!r}", key="total_steps")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ConfigError(
                f"warmup_steps lies in 0..{self.total_steps} (total_steps), got {self.warmup_steps!r}",
                key="warmup_steps",
            )
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"min_ratio lies between 0 and 1, got {self.min_ratio!r}", key="min_ratio")

    def at(self, step: int) -> float:
        """The rate of `step`."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        falling = self.total_steps - 1 - self.warmup_steps
        done = min((step - self.warmup_steps) / falling, 1.0) if falling > 0 else 1.0
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.peak_lr * (self.min_ratio + (1 - self.min_ratio) * cosine)
