"""Results of evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts the held-out split: lower is better. `run_id` has the record.

    `nats` is the sum over `tokens` predicted tokens. `text_bytes` are the UTF-8 bytes of the text behind them, so that
    `bits_per_byte` compares models with different tokenizers; special tokens add nats and no bytes.
    """

    model: str
    dataset: str
    run_id: str
    sequence_length: int
    stride: int
    tokens: int
    text_bytes: int
    nats: float

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the nats per token: among how many equally likely tokens the model hesitates."""
        return math.exp(self.nats_per_token) if self.nats_per_token < _LARGEST_EXPONENT else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Length of the best code for the text that the model gives, per byte; infinite without any text."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.inf

    @property
    def figures(self) -> dict[str, float]:
        """Every figure by name, as it is tracked."""
        return {
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
        }


_LARGEST_EXPONENT = math.log(1.7e308)
