"""Which models the CPU's kernels compute. Pure: loads no compiler."""

from __future__ import annotations

from typing import Literal

from sihe.models.config import ModelConfig

WeightKind = Literal["float32", "bfloat16", "int8", "int4"]


def is_supported(config: ModelConfig) -> bool:
    """Whether the operations compute this model; others go through torch."""
    scaling = config.positions.scaling
    return (
        config.task == "next_token"
        and config.attention.latent is None
        and config.positions.kind in ("rope", "learned", "sinusoidal", "none")
        and not (scaling is not None and scaling.kind == "dynamic")
        and config.layers.norm_first
        and not config.layers.embedding_norm
        and not config.layers.token_types
        and config.capacity_factor is None
    )
