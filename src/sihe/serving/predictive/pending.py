"""One request inside the predictor: which of its rows are computed, and what they have given so far.

A request with more rows than a batch holds is computed in slices. Between two of them it stands in the queue again,
behind who has come meanwhile: nobody waits for the whole of somebody else's large request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from sihe.core.errors import InternalError
from sihe.serving.predictive.batching import Item
from sihe.serving.predictive.types import Array, InferenceRequest, InferenceResult


@dataclass(slots=True)
class Pending:
    """Where a request stands. `item` is its next slice as the queue sees it; `rows` is 1 where rows are not counted."""

    item: Item
    request: InferenceRequest
    future: Future[InferenceResult]
    rows: int
    arrived_s: float
    is_batched: bool
    began_s: float | None = None
    compute_s: float = 0.0
    row: int = 0  # the first one that is not computed
    parts: list[dict[str, Array]] = field(default_factory=list)

    @property
    def slice_rows(self) -> int:
        """Rows of the next slice."""
        return self.item.rows if self.is_batched else 1

    @property
    def is_last_slice(self) -> bool:
        """Whether nothing is left after the next slice."""
        return self.row + self.slice_rows >= self.rows

    @property
    def is_computed(self) -> bool:
        """Whether every row has its outputs."""
        return self.row >= self.rows

    @property
    def queue_s(self) -> float | None:
        """From submission to its first slice; None before."""
        return None if self.began_s is None else self.began_s - self.arrived_s

    def inputs(self, name: str) -> Array:
        """The next slice of an input."""
        array = self.request.inputs[name]
        return array[self.row : self.row + self.slice_rows] if self.is_batched else array

    def take(self, outputs: Mapping[str, Array], compute_s: float) -> None:
        """Keeps what the slice has given, and goes on to the next one."""
        self.parts.append({name: outputs[name] for name in self.request.outputs})
        self.row += self.slice_rows
        self.compute_s += compute_s

    def next_slice(self, now_s: float) -> Item:
        """The rest as the queue shall see it: as if it came now."""
        self.item = replace(self.item, rows=min(self.item.rows, self.rows - self.row), arrived_s=now_s)
        return self.item

    def result(self, batch_rows: int) -> InferenceResult:
        """The whole answer."""
        outputs = {name: joined([part[name] for part in self.parts]) for name in self.request.outputs}
        return InferenceResult(outputs, self.queue_s or 0.0, self.compute_s, batch_rows)


def joined(arrays: Sequence[Array]) -> Array:
    """Rows of several arrays in one; an only one as it is."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def split(outputs: Mapping[str, Array], members: Sequence[Pending]) -> list[dict[str, Array]]:
    """Each member's rows of a batch's outputs. Raises `InternalError` where they have not a row for each."""
    total = sum(pending.slice_rows for pending in members)
    wanted = {name for pending in members for name in pending.request.outputs}
    for name in wanted:
        array = named(outputs, name)
        if array.ndim == 0 or array.shape[0] != total:
            raise InternalError(
                f"for {total} rows the model gave an output {name!r} of shape {list(array.shape)}: it does not treat "
                'rows apart, so describe it with  "batched": false'
            )
    answers, at = [], 0
    for pending in members:
        end = at + pending.slice_rows
        answers.append({name: outputs[name][at:end] for name in pending.request.outputs})
        at = end
    return answers


def named(outputs: Mapping[str, Array], name: str) -> Array:
    """One output. Raises `InternalError` where the model did not give it."""
    if name not in outputs:
        raise InternalError(f"the model gave no output {name!r}: it gave {', '.join(outputs) or 'none'}")
    return outputs[name]
