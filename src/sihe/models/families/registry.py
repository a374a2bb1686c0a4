"""Which families there are, and which one a model is written as.

Each family reads its own layout and refuses what the networks here do not compute, before any weight is read. A model
is written as the first family that would read it back unchanged, and else under a `model_type` of our own with our own
field names, which `transformers` does not know and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from sihe.core.errors import ConfigError
from sihe.models.errors import UnsupportedModel
from sihe.models.families import classic, encoders, rotary
from sihe.models.families.entries import Values, named

OWN = "sihe"
"""The `model_type` of what no family of `transformers` computes."""


@dataclass(frozen=True)
class Family:
    """One layout: `read` gives the fields of a `ModelConfig`, `write` takes them."""

    name: str
    read: Callable[[Values], dict[str, Any]]
    write: Callable[[Values], dict[str, Any]]


def read_config(values: Values) -> dict[str, Any]:
    """The fields of the `ModelConfig` that a config.json describes, in the layout of `transformers` 4 or 5.

    Raises `UnsupportedModel` for what no network here computes, `ConfigError` for a missing or wrong entry.
    """
    name = values.get("model_type")
    if name is None:
        raise ConfigError("config.json lacks 'model_type': it must describe a model", key="model_type")
    if name not in FAMILIES:
        raise UnsupportedModel("model_type", name, " or ".join(map(repr, FAMILIES)))
    return FAMILIES[name].read(values)


def _read_own(values: Values) -> dict[str, Any]:
    fields = values.get(OWN)
    if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
        raise ConfigError(f"config.json: {OWN} is a mapping of the model's fields, got {fields!r}", key=OWN)
    return dict(fields)


def _write_own(fields: Values) -> dict[str, Any]:
    plain = {
        key: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for key, value in fields.items()
    }
    return named("SiheModel", OWN) | {OWN: plain}


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", rotary.read_llama, rotary.write_llama),
        Family("mistral", rotary.read_mistral, rotary.write_mistral),
        Family("qwen2", rotary.read_qwen2, rotary.write_qwen2),
        Family("qwen3", rotary.read_qwen3, rotary.write_qwen3),
        Family("mixtral", rotary.read_mixtral, rotary.write_mixtral),
        Family("deepseek_v2", rotary.read_deepseek_v2, rotary.write_deepseek_v2),
        Family("gpt2", classic.read_gpt2, classic.write_gpt2),
        Family("bloom", classic.read_bloom, classic.write_bloom),
        Family("bert", encoders.read_bert, encoders.write_bert),
        Family("roberta", encoders.read_roberta, encoders.write_roberta),
        Family("xlm-roberta", encoders.read_roberta, encoders.write_roberta),
        Family("distilbert", encoders.read_distilbert, encoders.write_distilbert),
        Family(OWN, _read_own, _write_own),
    )
}
"""By `model_type`; the first that would give a model back unchanged is the one that it is written as."""
