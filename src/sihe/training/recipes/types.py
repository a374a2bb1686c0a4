"""The values that recipes pass around: completions, terms of a loss, what happens during a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sihe.core.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

    from sihe.core.tracking import ModelVersion


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Temperature 0 is greedy; policy gradients need 1, at which the log-probabilities that
    come with a completion are those by which it was drawn."""

    max_tokens: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidInput(f"max_tokens is at least 1, got {self.max_tokens!r}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InvalidInput(f"temperature is not negative, got {self.temperature!r}")


@dataclass(frozen=True)
class Completion:
    """Sampled tokens, the end token included when it came, and the log-probability of each before temperature."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version: int
    """Which weights made it."""


@dataclass(frozen=True)
class Terms:
    """One rank's part of a step: `loss` is a sum over `weight` items, and so are the metrics."""

    loss: Tensor
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageStep:
    """One optimizer step of a stage, from 1; metrics are means over the global batch."""

    stage: str
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """Metrics on held-out problems after `step` steps of a stage."""

    stage: str
    step: int
    metrics: Mapping[str, float]


RecipeEvent = StageStep | Measured


@dataclass(frozen=True)
class RecipeResult:
    """One run of a recipe with one seed."""

    run_id: str
    seed: int
    base_version: ModelVersion
    model_version: ModelVersion
    measured: tuple[Measured, ...]
    """Every measurement, in order."""
    seconds: float

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Steps and values of `metric` over the last stage."""
        last = self.measured[-1].stage
        return [(item.step, item.metrics[metric]) for item in self.measured if item.stage == last]
