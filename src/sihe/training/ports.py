"""What the loop and the checkpoints ask of an optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Optimizer(Protocol):
    """Updates the weights of one model from their `.grad`."""

    def step(self, lr: float) -> float:
        """Clips the gradients, updates the weights; the gradients' norm before clipping."""
        ...

    def state_tensors(self) -> Mapping[str, Tensor]:
        """Everything that it remembers from step to step, by name."""
        ...

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state_tensors` gave."""
        ...


class Schedule(Protocol):
    """The learning rate over the run."""

    def at(self, step: int) -> float:
        """The rate of `step`, from 0."""
        ...
