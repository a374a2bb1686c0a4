"""What was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sihe.cluster.planner.step import StepEstimate


@dataclass(frozen=True)
class Compared:
    """One quantity. `ratio` is the prediction over the measurement; None where nothing was measured or it was 0."""

    quantity: str
    unit: str
    predicted: float
    measured: float | None
    ratio: float | None


def predictions(estimate: StepEstimate) -> dict[str, tuple[float, str]]:
    """Every quantity that can be compared, with its unit."""
    memory = estimate.memory
    return {
        "step time": (estimate.seconds, "s"),
        "throughput": (estimate.tokens_per_s, "tokens/s"),
        "MFU": (estimate.mfu, ""),
        "peak memory": (memory.total, "B"),
        "model states": (memory.weights + memory.gradients + memory.optimizer, "B"),
        "activations": (memory.activations, "B"),
        "bubble": (estimate.bubble_s / estimate.seconds, ""),
        "exposed communication": (estimate.communication_s, "s"),
    }


def compare(estimate: StepEstimate, measured: Mapping[str, float]) -> list[Compared]:
    """The quantities that were `measured` (names as in `predictions`), in the order of the predictions.

    Raises `KeyError` for a name that nobody predicts: a comparison that is left out must not go unseen.
    """
    known = predictions(estimate)
    unknown = measured.keys() - known.keys()
    if unknown:
        raise KeyError(f"no prediction is called {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    return [
        Compared(name, unit, value, measured[name], value / measured[name] if measured[name] else None)
        for name, (value, unit) in known.items()
        if name in measured
    ]
