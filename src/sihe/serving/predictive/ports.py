"""What a library must do to be served, and what the predictor tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from sihe.serving.predictive.types import Array

Outcome = Literal["ok", "invalid", "failed", "expired", "refused", "aborted"]


class Backend(Protocol):
    """A loaded model. `run` may be called from several threads at once."""

    def run(self, inputs: Mapping[str, Array], outputs: frozenset[str]) -> Mapping[str, Array]:
        """The wanted `outputs` (it may give more). Raises `InvalidInput` for values that the model cannot take."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...


class ServedModel(Protocol):
    """A deployment as health and metadata show it (the gateway's `DeploymentStatus`)."""

    @property
    def name(self) -> str:
        """What clients call it."""
        ...

    @property
    def version(self) -> int | None:
        """The version that serves now; None when none does."""
        ...

    @property
    def error(self) -> str | None:
        """Why it does not serve what is wanted."""
        ...


@dataclass(frozen=True, slots=True)
class BatchStats:
    """One computed batch."""

    requests: int
    rows: int
    compute_s: float
    waiting: int  # requests that still wait


class PredictorObserver(Protocol):
    """Called on the predictor's threads: must return at once and not raise."""

    def on_batch(self, stats: BatchStats) -> None:
        """A batch was computed."""
        ...

    def on_request(self, outcome: Outcome, queue_s: float | None) -> None:
        """A request has ended; `queue_s` is None when it never began."""
        ...

    def on_close(self) -> None:
        """The predictor has ended."""
        ...


class NoObserver:
    """Nobody watches."""

    def on_batch(self, stats: BatchStats) -> None:
        """Ignored."""

    def on_request(self, outcome: Outcome, queue_s: float | None) -> None:
        """Ignored."""

    def on_close(self) -> None:
        """Ignored."""
