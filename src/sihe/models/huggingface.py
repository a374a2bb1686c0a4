"""config.json in the layouts of `transformers`, as the fields of a `ModelConfig` and back.

Each family reads its own layout and refuses what the networks here do not compute, before any weight is read. A model
is written as the first family that would read it back unchanged, and else under a `model_type` of our own with our own
field names, which `transformers` does not know and says so. Pure: needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from sihe.core.errors import ConfigError
from sihe.models.errors import UnsupportedModel

OWN = "sihe"
"""The `model_type` of what no family of `transformers` computes."""
Values = Mapping[str, Any]


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


def _require(values: Values, expected: Values) -> None:
    for key, supported in expected.items():
        value = values.get(key, supported)
        if value != supported:
            raise UnsupportedModel(key, value, repr(supported))


def _need(values: Values, *keys: str) -> None:
    for key in keys:
        if values.get(key) is None:
            raise ConfigError(f"config.json lacks {key!r}: it must describe a whole model", key=key)


# ---- Llama and those built like it ---------------------------------------------------------------------------------

_SHAPE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _read_rotary(values: Values, *, max_positions: int = 2048, theta: float = 1e4, eps: float = 1e-6) -> dict[str, Any]:
    _need(values, *_NEEDED)
    _require(values, {"hidden_act": "silu"})
    heads = size(values, "num_attention_heads")
    return {
        "vocab_size": size(values, "vocab_size"),
        "hidden_size": size(values, "hidden_size"),
        "num_layers": size(values, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": size(values, "num_key_value_heads", heads),
        "head_dim": size(values, "head_dim", size(values, "hidden_size") // heads),
        "intermediate_size": size(values, "intermediate_size"),
        "max_positions": size(values, "max_position_embeddings", max_positions),
        "rope_theta": _rope_theta(values, theta),
        "norm_eps": number(values, "rms_norm_eps", eps),
        "tie_embeddings": flag(values, "tie_word_embeddings", default=False),
        **read_tokens(values),
    }


def _write_rotary(fields: Values) -> dict[str, Any]:
    return {
        **{theirs: fields[ours] for ours, theirs in _SHAPE.items()},
        "hidden_act": "silu",
        "rope_theta": fields["rope_theta"],  # where transformers 4 looks
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["rope_theta"]},  # where transformers 5 looks
        **write_tokens(fields),
    }


def _rope_theta(values: Values, default: float) -> float:
    """The base of the rotary angles; refuses every way of stretching them."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json: rope_parameters is a mapping, got {rope!r}", key="rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UnsupportedModel("rope_parameters.rope_type", kind, "'default'")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedModel("partial_rotary_factor", partial, "1.0")
    return number(rope if "rope_theta" in rope else values, "rope_theta", default)


def _read_llama(values: Values) -> dict[str, Any]:
    _require(values, {"attention_bias": False, "mlp_bias": False})
    return _read_rotary(values)


def _write_llama(fields: Values) -> dict[str, Any]:
    return _named("LlamaForCausalLM", "llama") | _write_rotary(fields) | {"attention_bias": False, "mlp_bias": False}


def _read_mixtral(values: Values) -> dict[str, Any]:
    _require(values, {"sliding_window": None, "attention_dropout": 0.0, "router_jitter_noise": 0.0})
    fields = _read_rotary(values, max_positions=4096 * 32, theta=1e6, eps=1e-5)
    coefficient = number(values, "router_aux_loss_coef", 0.001)
    balanced = {"router_balance": "loss", "balance_coefficient": coefficient}
    return fields | {
        "num_experts": size(values, "num_local_experts", 8),
        "experts_per_token": size(values, "num_experts_per_tok", 2),
        "expert_intermediate_size": fields["intermediate_size"],
        **(balanced if coefficient else {"router_balance": "none"}),
    }


def _write_mixtral(fields: Values) -> dict[str, Any]:
    return {
        **_named("MixtralForCausalLM", "mixtral"),
        **_write_rotary(fields),
        "intermediate_size": fields["expert_intermediate_size"],
        "num_local_experts": fields["num_experts"],
        "num_experts_per_tok": fields["experts_per_token"],
        "router_aux_loss_coef": fields["balance_coefficient"] if fields["router_balance"] == "loss" else 0.0,
        "sliding_window": None,
    }


# ---- ours ----------------------------------------------------------------------------------------------------------


def _read_own(values: Values) -> dict[str, Any]:
    fields = values.get(OWN)
    if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
        raise ConfigError(f"config.json: {OWN} is a mapping of the model's fields, got {fields!r}", key=OWN)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def _write_own(fields: Values) -> dict[str, Any]:
    plain = {key: asdict(value) if is_dataclass(value) else value for key, value in fields.items()}  # type: ignore[arg-type]  # is_dataclass allows classes
    return _named("SiheModel", OWN) | {OWN: plain}


def _named(architecture: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type}


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", _read_llama, _write_llama),
        Family("mixtral", _read_mixtral, _write_mixtral),
        Family(OWN, _read_own, _write_own),
    )
}
"""By `model_type`; the first that would give a model back unchanged is the one that it is written as."""


# ---- entries -------------------------------------------------------------------------------------------------------


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
