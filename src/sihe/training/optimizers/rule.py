"""What an optimizer asks of an update rule, and what a rule may know of a weight.

A rule is a frozen value: its settings. What it remembers lies in one dict of tensors for each weight, which the
optimizer keeps, saves and loads. It sees the part of each weight that this rank holds; most rules move every element on
its own and need no more. One that works on whole matrices asks the weight's `Matrix`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sihe.core.errors import ConfigError

State = dict[str, Tensor]


class Matrix(Protocol):
    """Where this rank's part of a matrix lies in the whole; [..., rows, columns], leading dims stack matrices."""

    def gather(self, local: Tensor) -> Tensor:
        """The whole of which `local` is this rank's part; a collective where ranks hold different parts."""
        ...

    def scatter(self, whole: Tensor) -> Tensor:
        """This rank's part of `whole`; no communication."""
        ...


@dataclass(frozen=True)
class Weight:
    """One parameter as a rule sees it."""

    name: str
    master: Tensor
    """This rank's part, float32; the rule moves it in place."""
    decays: bool
    """Whether weight decay applies: to matrices, not to norms and biases."""
    matrix: Matrix | None = None
    """Given for the matrices of the hidden layers; None for embeddings, the head and vectors."""


class UpdateRule(Protocol):
    """Moves masters along gradients."""

    @property
    def needs_whole_matrix(self) -> bool:
        """Whether `update` gathers matrices, so that every rank must call it with the same weights in one order."""
        ...

    def init(self, weight: Weight) -> State:
        """What the rule remembers of `weight` before the first step."""
        ...

    def update(
        self, weights: Sequence[Weight], grads: Sequence[Tensor], states: Sequence[State], *, lr: float, step: int
    ) -> None:
        """Moves every `weight.master` in place and `states` with it, as step number `step` (from 1).

        `grads` are float32, shaped as the masters, and stay as they are.
        """
        ...

    def unpacked(self, state: State) -> Mapping[str, Tensor]:
        """The state as tensors of the master's shape, which a checkpoint can cut anew for other ranks."""
        ...

    def pack(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `unpacked` gave, bit for bit; the same tensors where nothing is packed."""
        ...


class PlainState:
    """The half of a rule that keeps its state as it is saved: tensors of the master's shape."""

    def unpacked(self, state: State) -> Mapping[str, Tensor]:
        """The live tensors."""
        return state

    def pack(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Copies `tensors` into the state; those that are the live ones already stay."""
        for name, kept in state.items():
            if tensors[name] is not kept:
                kept.copy_(tensors[name])


def by_decay(weights: Sequence[Weight], weight_decay: float) -> list[tuple[list[int], float]]:
    """Indices into `weights` of those that are decayed and of those that are not, each with its decay; no empty one."""
    groups = [
        ([index for index, weight in enumerate(weights) if weight.decays is decays], weight_decay if decays else 0.0)
        for decays in (True, False)
    ]
    return [(indices, decay) for indices, decay in groups if indices]


def steps_before(step: int, count: int, like: Tensor) -> list[Tensor]:
    """The counters that torch's fused kernels want, one a weight; they add the present step themselves."""
    return list(torch.full((count,), float(step - 1), device=like.device).unbind())


def check_betas(betas: tuple[float, float]) -> None:
    """Raises `ConfigError` unless `betas` are two numbers in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas are two numbers in [0, 1), got {betas!r}", key="betas")


def check_weight_decay(weight_decay: float) -> None:
    """Raises `ConfigError` unless it is a number that is not negative."""
    if not 0 <= weight_decay < float("inf"):
        raise ConfigError(f"weight_decay is not negative, got {weight_decay!r}", key="weight_decay")
