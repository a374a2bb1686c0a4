"""Entries of a config.json, checked one by one as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sihe.core.errors import ConfigError
from sihe.models.errors import UnsupportedModel

Values = Mapping[str, Any]
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
"""What `transformers` calls the function of a plain feed-forward layer, and what it is called here."""
WRITTEN = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
"""The way back."""


def named(architecture: str, model_type: str) -> dict[str, Any]:
    """How a config.json says what it describes."""
    return {"architectures": [architecture], "model_type": model_type}


def require(values: Values, expected: Values) -> None:
    """Raises `UnsupportedModel` for an entry that asks for more than the networks here compute."""
    for key, supported in expected.items():
        value = values.get(key, supported)
        if value != supported:
            raise UnsupportedModel(key, value, repr(supported))


def need(values: Values, *keys: str) -> None:
    """Raises `ConfigError` for an entry that is not there."""
    for key in keys:
        if values.get(key) is None:
            raise ConfigError(f"config.json lacks {key!r}: it must describe a whole model", key=key)


def heads(hidden_size: int, count: int) -> dict[str, Any]:
    """The shape of plain multi-head attention."""
    return {"hidden_size": hidden_size, "num_heads": count, "num_kv_heads": count, "head_dim": hidden_size // count}


def size(values: Values, key: str, default: int | None = None) -> int:
    """A positive whole number."""
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {key} is a positive whole number, got {value!r}", key=key)
    return value


def number(values: Values, key: str, default: float) -> float:
    """A number."""
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is a number, got {value!r}", key=key)
    return float(value)


def flag(values: Values, key: str, *, default: bool) -> bool:
    """True or false."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is true or false, got {value!r}", key=key)
    return value


def choice(values: Values, key: str, default: str, choices: Mapping[str, str]) -> str:
    """What a word means here. Raises `UnsupportedModel` for another word."""
    value = values.get(key, default)
    if value not in choices:
        raise UnsupportedModel(key, value, " or ".join(map(repr, choices)))
    return choices[value]


def read_tokens(values: Values) -> dict[str, Any]:
    """The tokens that begin and end a text: config.json has none, one, or a list of them."""
    found: dict[str, list[int]] = {}
    for key in ("bos_token_id", "eos_token_id"):
        value = values.get(key)
        found[key] = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in found[key]):
            raise ConfigError(f"config.json: {key} is a token id or a list of them, got {value!r}", key=key)
    bos, eos = found.values()
    return {
        "bos_token_id": bos[0] if bos else None,
        "eos_token_id": eos[0] if eos else None,
        "more_eos_token_ids": tuple(eos[1:]),
    }


def write_tokens(fields: Values) -> dict[str, Any]:
    """The tokens that begin and end a text."""
    first, more = fields["eos_token_id"], fields["more_eos_token_ids"]
    return {"bos_token_id": fields["bos_token_id"], "eos_token_id": [first, *more] if more else first}
