"""What recipes ask of others: an objective to train for, and someone who samples from the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from sihe.models.decoder import Decoder
    from sihe.training.recipes.config import GrpoStage
    from sihe.training.recipes.types import Completion, Sampling, Terms


class Objective(Protocol):
    """What one stage of a recipe trains. The batch of a step is a function of seed and step alone."""

    @property
    def module(self) -> nn.Module:
        """Everything that a checkpoint holds; its parameters that require gradients are trained."""
        ...

    def terms(self, step: int) -> Terms:
        """This rank's loss of `step` (from 0), with its graph."""
        ...

    def measure(self) -> Mapping[str, float]:
        """Metrics on held-out problems; the same at every call with the same weights."""
        ...


class Rollout(Protocol):
    """Samples completions from a policy, and takes new weights for it.

    `version` grows from transfer to transfer and comes back with every completion.
    """

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """One completion for each prompt (token ids); the same for the same weights and seed."""
        ...

    def load(self, policy: Decoder, version: int) -> None:
        """From now on completions come from these weights. Raises `WeightSyncFailed` when that takes too long."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


class OpenRollout(Protocol):
    """Makes the rollout that a stage asks for."""

    def __call__(self, stage: GrpoStage, model_folder: Path) -> Rollout:
        """Samples from the model that lies in `model_folder`, at version 0."""
        ...
