"""Which activations are computed again in place of being kept. Pure: needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sihe.core.errors import ConfigError

Policy = Literal["none", "attention", "full", "every"]


@dataclass(frozen=True)
class RecomputeConfig:
    """What the backward pass computes again, so that less is kept until then (Chen et al. 2016, arXiv 1604.06174).

    - `none`: nothing.
    - `attention`: each block's attention, with its products; of it only its input is kept.
    - `full`: each block; of it only its input is kept.
    - `every`: of every `every` blocks the first, in full.
    """

    policy: Policy = "none"
    every: int = 2

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            choices = ", ".join(get_args(Policy))
            raise ConfigError(f"recompute.policy is one of {choices}, got {self.policy!r}", key="recompute.policy")
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ConfigError(f"recompute.every is a positive whole number, got {self.every!r}", key="recompute.every")

    def is_recomputed(self, layer: int) -> bool:
        """Whether anything of layer number `layer` is computed again."""
        return self.policy in ("attention", "full") or (self.policy == "every" and layer % self.every == 0)
