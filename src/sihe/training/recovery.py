"""What a run does about failures, as pure decisions: which step is not accepted, what is repeated and what is skipped,
and with how many workers a run can go on.

A step whose loss or gradient norm is no number, or whose loss jumps, is not accepted: the run goes back to its newest
checkpoint. The first time it repeats the step on the same samples, since a fault of the hardware does not come twice
(then nothing of the failure is left in the run); when it comes again, the samples are skipped. To go back and skip is
what PaLM's training did about spikes (arXiv 2204.02311, section 5.1). Every decision is recorded, so that whoever
continues the run makes the same ones, and their number is bounded.

Pure: no torch, no I/O, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from sihe.core.errors import ConfigError
from sihe.training.parallel.plan import ParallelPlan

_NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation, 1 / Phi^-1(3/4)."""


@dataclass(frozen=True)
class RecoveryConfig:
    """How a run meets failures. Raises `ConfigError` that names the key."""

    max_rewinds: int = 4
    """Returns to a checkpoint because of a step that was not accepted, in the whole life of a run; then `Diverged`."""
    repeats: int = 1
    """How often a step that was not accepted is computed again before its samples are skipped."""
    spike_factor: float | None = None
    """A loss above this many times the median of the window is a spike. Off when left out."""
    spike_zscore: float | None = None
    """A loss this many (robust) standard deviations above the median of the window is a spike. Off when left out."""
    spike_window: int = 50
    """Accepted steps that a loss is compared with; there are no spikes before there are so many."""
    hang_timeout_s: float | None = None
    """Without progress of any rank, all are killed and start again. Three quarters of collective_timeout_s when left
    out, so that the stacks of the ranks are seen before one of them gives up. Longer than the slowest micro-batch."""
    startup_timeout_s: float = 600.0
    """The same during imports, checkpoints and export."""
    straggler_factor: float = 1.5
    """A rank is reported when its median compute time is more than this many times that of the others."""
    straggler_window: int = 20
    """Steps over which the medians are taken."""
    min_workers: int | None = None
    """The run goes on with so few ranks when there are no more; as many as the plan has when left out."""
    max_workers: int | None = None
    """The run uses so many ranks when there are enough; as many as the plan has when left out."""
    capacity_timeout_s: float = 600.0
    """How long to wait for min_workers."""
    restart_window_s: float | None = None
    """When given, max_restarts counts restarts in this time, not in the whole life of the run: it may fail for ever."""

    def __post_init__(self) -> None:
        for name in ("max_rewinds", "repeats", "capacity_timeout_s"):
            _check(name, getattr(self, name) >= 0, "not negative", getattr(self, name))
        for name in ("spike_window", "straggler_window"):
            _check(name, getattr(self, name) >= 3, "at least 3", getattr(self, name))
        for name in ("spike_factor", "straggler_factor"):
            value = getattr(self, name)
            _check(name, value is None or value > 1, "above 1", value)
        for name in ("spike_zscore", "hang_timeout_s", "restart_window_s"):
            value = getattr(self, name)
            _check(name, value is None or value > 0, "positive", value)
        for name in ("min_workers", "max_workers"):
            value = getattr(self, name)
            _check(name, value is None or value >= 1, "at least 1", value)
        least_s = self.hang_timeout_s or 0
        _check(
            "startup_timeout_s",
            self.startup_timeout_s > 0 and self.startup_timeout_s >= least_s,
            "positive and at least hang_timeout_s",
            self.startup_timeout_s,
        )

    def quiet_s(self, collective_timeout_s: float) -> float:
        """Seconds without progress after which ranks hang."""
        return min(self.hang_timeout_s or 0.75 * collective_timeout_s, self.startup_timeout_s)


# ---- steps that are not accepted ----------------------------------------------------------------------------------


class LossGuard:
    """Says of each step whether it is accepted; the same on every rank that sees the same numbers.

    `losses` are those of the steps before, by step, of a run that goes on.
    """

    def __init__(self, config: RecoveryConfig, losses: Mapping[int, float] | None = None) -> None:
        self._config = config
        self._losses = dict(losses or {})

    def objection(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why step `step` is not accepted; `None` when it is, and then it counts for later ones."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} {value!r}"
        window = [self._losses[past] for past in range(step - self._config.spike_window, step) if past in self._losses]
        if len(window) == self._config.spike_window and (spike := self._spike(loss, window)):
            return spike
        self._losses[step] = loss
        return None

    def rewind(self, step: int) -> None:
        """Forgets what came after `step`."""
        self._losses = {past: loss for past, loss in self._losses.items() if past <= step}

    def _spike(self, loss: float, window: Sequence[float]) -> str | None:
        middle = median(window)
        factor, zscore = self._config.spike_factor, self._config.spike_zscore
        if factor is not None and loss > factor * middle:
            return f"loss {loss:.6g}, more than {factor:g} times the median {middle:.6g} of {len(window)} steps"
        if zscore is not None:
            deviation = _NORMAL_MAD * median(abs(past - middle) for past in window)
            if loss - middle > zscore * deviation:
                return f"loss {loss:.6g}, more than {zscore:g} deviations ({deviation:.3g}) above {middle:.6g}"
        return None


@dataclass(frozen=True)
class Rewind:
    """Step `step` was not accepted; its samples are [`first_sample`, `next_sample`)."""

    step: int
    first_sample: int
    next_sample: int
    reason: str
    action: Literal["repeat", "skip"]


def next_rewind(
    config: RecoveryConfig, past: Sequence[Rewind], *, step: int, first_sample: int, next_sample: int, reason: str
) -> Rewind | None:
    """What happens about a step that was not accepted, after the rewinds `past`; `None` when there were too many."""
    if len(past) >= config.max_rewinds:
        return None
    repeated = sum(rewind.first_sample == first_sample and rewind.action == "repeat" for rewind in past)
    action: Literal["repeat", "skip"] = "repeat" if repeated < config.repeats else "skip"
    return Rewind(step, first_sample, next_sample, reason, action)


def after_skips(sample: int, rewinds: Sequence[Rewind]) -> int:
    """Where the order goes on when it has come to `sample`: behind the samples that are skipped there."""
    skips = {rewind.first_sample: rewind.next_sample for rewind in rewinds if rewind.action == "skip"}
    while sample in skips:
        sample = skips[sample]
    return sample


# ---- workers ------------------------------------------------------------------------------------------------------


def resized(plan: ParallelPlan, workers: int) -> ParallelPlan:
    """`plan` on another number of ranks: only the number of replicas or shards changes. Raises `ConfigError`."""
    if workers == plan.world_size:
        return plan
    replica = plan.world_size // plan.batch_ranks
    if workers % replica:
        raise ConfigError(
            f"the plan {plan} runs on multiples of {replica} ranks, got {workers}", key="recovery.min_workers"
        )
    return plan.with_data_ranks(workers // replica)


def feasible_workers(
    plan: ParallelPlan, config: RecoveryConfig, *, global_batch: int, micro_batch: int
) -> tuple[int, ...]:
    """Every number of ranks between min_workers and max_workers with which `plan` can keep its global batch.

    Samples are shared out evenly; without a pipeline the last micro-batch of a rank may be smaller. Raises
    `ConfigError` when the plan's own number is not among them.
    """
    smallest = config.min_workers if config.min_workers is not None else plan.world_size
    largest = config.max_workers if config.max_workers is not None else plan.world_size
    _check("min_workers", smallest <= plan.world_size, f"at most the plan's ranks ({plan.world_size})", smallest)
    _check("max_workers", largest >= plan.world_size, f"at least the plan's ranks ({plan.world_size})", largest)
    return tuple(
        workers
        for workers in range(smallest, largest + 1)
        if workers == plan.world_size or _is_feasible(plan, workers, global_batch, micro_batch)
    )


def _is_feasible(plan: ParallelPlan, workers: int, global_batch: int, micro_batch: int) -> bool:
    try:
        other = resized(plan, workers)
    except ConfigError:
        return False
    at_once = micro_batch * plan.microbatches if plan.pp > 1 else 1
    return global_batch % (other.batch_ranks * at_once) == 0


def _check(key: str, holds: bool, expected: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"training setting 'recovery.{key}' must be {expected}, got {value!r}", key=f"recovery.{key}")
