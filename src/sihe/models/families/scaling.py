"""How a config.json says that rotary angles are stretched for longer sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sihe.core.errors import ConfigError
from sihe.models.architecture import RopeScaling
from sihe.models.errors import UnsupportedModel
from sihe.models.families.entries import Values, flag, number, size

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(values: Values, default_theta: float, max_positions: int) -> tuple[float, RopeScaling | None, int]:
    """The base of the angles, how they are stretched, and the longest sequence, which dynamic scaling lengthens."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json: rope_parameters is a mapping, got {rope!r}", key="rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KINDS:
        raise UnsupportedModel("rope_parameters.rope_type", kind, " or ".join(map(repr, _KINDS)))
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedModel("partial_rotary_factor", partial, "1.0")
    theta = number(rope if "rope_theta" in rope else values, "rope_theta", default_theta)
    if kind == "default":
        return theta, None, max_positions
    if rope.get("factor") is None:
        raise ConfigError("config.json: rope_parameters lacks 'factor'", key="rope_parameters.factor")
    factor = number(rope, "factor", 1.0)
    original = size(rope, "original_max_position_embeddings", max_positions)
    match kind:
        case "linear":
            scaling = RopeScaling("linear", factor, max_positions)
        case "dynamic":
            scaling, max_positions = RopeScaling("dynamic", factor, max_positions), int(max_positions * factor)
        case "llama3":
            scaling = RopeScaling(
                "llama3",
                factor,
                original,
                low_frequency=number(rope, "low_freq_factor", 1.0),
                high_frequency=number(rope, "high_freq_factor", 4.0),
            )
        case _:
            scaling = RopeScaling(
                "yarn",
                factor,
                original,
                beta_fast=number(rope, "beta_fast", 32.0),
                beta_slow=number(rope, "beta_slow", 1.0),
                attention_factor=_attention_factor(rope, factor),
                truncate=flag(rope, "truncate", default=True),
            )
    return theta, scaling, max_positions


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Entries for `transformers` 4 and 5."""
    if scaling is None:
        parameters: dict[str, Any] = {"rope_type": "default"}
    else:
        parameters = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        parameters |= {"low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency}
    if scaling is not None and scaling.kind == "yarn":
        parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            parameters["attention_factor"] = scaling.attention_factor
    if scaling is not None and scaling.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = scaling.original_positions
    old = {} if scaling is None else {"rope_scaling": parameters}
    return {"rope_theta": theta, **old, "rope_parameters": {**parameters, "rope_theta": theta}}


def _attention_factor(rope: Values, factor: float) -> float | None:
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor", 1.0)
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if not scale or not scale_all:
        return None
    growth = 0.1 * math.log(factor)
    return (growth * number(rope, "mscale", 1.0) + 1) / (growth * number(rope, "mscale_all_dim", 1.0) + 1)
