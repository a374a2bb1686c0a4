"""What a low-rank adapter is, as one value. Pure: needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sihe.core.errors import ConfigError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a block that an adapter can change, by their names in a Hugging Face Llama."""


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank update of some matrices of every block: W + scale · B A. Checks itself.

    `rank` is the inner size of B A; `dropout` the probability with which an input of A is left out in training. The
    default targets are those that Hu et al. 2021 (arXiv 2106.09685, table 5) found best for a given size. With
    `rslora` the scale is alpha / sqrt(rank), which keeps the update's size steady as the rank grows (Kalajdzievski
    2023, arXiv 2312.03732), in place of alpha / rank.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError(f"lora.rank is a positive whole number, got {self.rank!r}", key="lora.rank")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"lora.alpha is a positive number, got {self.alpha!r}", key="lora.alpha")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout lies in [0, 1), got {self.dropout!r}", key="lora.dropout")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"lora.targets is one or more of {', '.join(TARGETS)}, each once, got {self.targets!r}",
                key="lora.targets",
            )

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
