"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sihe.core.errors import ConfigError

ScheduleKind = Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"]
Decay = Literal["linear", "sqrt"]


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up to `peak_lr`, then what `kind` says. Checks itself; `at` is the schedule.

    Steps count from 0. The last step of the warm-up and the first after it run at the peak, and where the rate falls to
    a floor, step `total_steps - 1` and any later one run at `min_ratio * peak_lr`:

        cosine        half a cosine down to the floor (Loshchilov and Hutter 2017, arXiv 1608.03983)
        linear        a straight line down to the floor
        wsd           the peak until the last `decay_steps`, then down to the floor as `decay` says: "linear", or by
                      the square root of the share that is done (Hu et al. 2024, arXiv 2404.06395, section 4;
                      Hägele et al. 2024, arXiv 2405.18392, section 3, for "sqrt"). The steps before the fall do not
                      depend on `total_steps`, so a run can be prolonged from there
        inverse_sqrt  peak * sqrt(warmup_steps / steps) (Vaswani et al. 2017, arXiv 1706.03762, section 5.3); has no
                      floor and no end
        constant      the peak; has no floor and no end
    """

    peak_lr: float
    warmup_steps: int
    total_steps: int
    min_ratio: float = 0.1
    kind: ScheduleKind = "cosine"
    decay_steps: int = 0
    """How long the fall of `wsd` takes, the step at the floor included; 0 for every other kind."""
    decay: Decay = "sqrt"

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
        if self.kind not in get_args(ScheduleKind):
            raise ConfigError(f"kind is one of {', '.join(get_args(ScheduleKind))}, got {self.kind!r}", key="kind")
        if self.decay not in get_args(Decay):
            raise ConfigError(f"decay is one of {', '.join(get_args(Decay))}, got {self.decay!r}", key="decay")
        if self.kind != "wsd" and self.decay_steps:
            raise ConfigError(
                f"decay_steps belongs to the kind 'wsd', got {self.decay_steps!r} for {self.kind!r}", key="decay_steps"
            )
        if self.kind == "wsd" and not 1 <= self.decay_steps <= self.total_steps - self.warmup_steps:
            raise ConfigError(
                f"decay_steps lies in 1..{self.total_steps - self.warmup_steps} (total_steps - warmup_steps), "
                f"got {self.decay_steps!r}",
                key="decay_steps",
            )

    def at(self, step: int) -> float:
        """The rate of `step`."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        return self.peak_lr * self._ratio(step)

    def _ratio(self, step: int) -> float:
        """The rate after the warm-up, as a share of the peak."""
        match self.kind:
            case "constant":
                return 1.0
            case "inverse_sqrt":
                start = max(self.warmup_steps, 1)
                return math.sqrt(start / max(step + 1, start))
            case "wsd":
                fallen = step + 1 - (self.total_steps - self.decay_steps)
                done = min(max(fallen / self.decay_steps, 0.0), 1.0)
                height = 1 - (math.sqrt(done) if self.decay == "sqrt" else done)
            case _:
                falling = self.total_steps - 1 - self.warmup_steps
                done = min((step - self.warmup_steps) / falling, 1.0) if falling > 0 else 1.0
                height = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.min_ratio + (1 - self.min_ratio) * height


CosineSchedule = ScheduleConfig  # by the name of its first kind, which is the default
