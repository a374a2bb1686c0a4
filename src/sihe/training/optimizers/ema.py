"""The running average of the weights (Polyak and Juditsky 1992), often better than the last ones.

It follows the float32 masters, whatever part of them a rank holds, so it shards as they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sihe.core.errors import ConfigError, InvalidInput


class WeightAverage:
    """a ← d·a + (1 - d)·w after each step, starting from the weights that are there when this is made.

    With `warms_up`, step n averages with min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten
    (tf.train.ExponentialMovingAverage's `num_updates`).
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float = 0.999, *, warms_up: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"decay lies in [0, 1), got {decay!r}", key="ema_decay")
        self.decay = decay
        self._warms_up = warms_up
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self._averages = {
            name: weight.float().clone(memory_format=torch.contiguous_format) for name, weight in self._weights.items()
        }
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of one more step in. Complexity: one pass over them."""
        self._steps += 1
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps)) if self._warms_up else self.decay
        weights = [weight.float() for weight in self._weights.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside of it, the weights are their averages; afterwards they are again what they were, bit for bit."""
        with torch.no_grad():
            before = {name: weight.clone() for name, weight in self._weights.items()}
            self._overwrite(self._averages)
        try:
            yield
        finally:
            with torch.no_grad():
                self._overwrite(before)

    def state_tensors(self) -> dict[str, Tensor]:
        """`step`, and each average as `average.<name>`; the live tensors."""
        averages = {f"average.{name}": average for name, average in self._averages.items()}
        return {"step": torch.tensor(self._steps), **averages}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state_tensors` gave. Raises `InvalidInput` for another model's; nothing has changed then."""
        expected = self.state_tensors()
        for name in sorted(expected.keys() | tensors.keys()):
            want, got = expected.get(name), tensors.get(name)
            if want is None or got is None or want.shape != got.shape:
                shapes = [None if tensor is None else list(tensor.shape) for tensor in (want, got)]
                raise InvalidInput(
                    f"average of weights: {name!r} should have the shape {shapes[0]}, got {shapes[1]}: "
                    "it belongs to another model"
                )
        self._steps = int(tensors["step"])
        for name, average in self._averages.items():
            average.copy_(tensors[f"average.{name}"])

    def _overwrite(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])
