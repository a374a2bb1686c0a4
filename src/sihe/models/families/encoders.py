"""Encoders with learned places and norms after each sum: BERT, RoBERTa, XLM-RoBERTa, DistilBERT.

Dropout is not computed here: the entries for it are passed over when read, and written as 0. What a model ends in is
read from the class that `architectures` names.
"""

from __future__ import annotations

from typing import Any

from sihe.core.errors import ConfigError
from sihe.models.architecture import AttentionConfig, LayerConfig, PositionConfig, Task
from sihe.models.families.entries import (
    ACTIVATIONS,
    WRITTEN,
    Values,
    choice,
    flag,
    heads,
    named,
    need,
    number,
    read_tokens,
    require,
    size,
    write_tokens,
)

_ENDS: dict[str, Task] = {"Model": "pooled", "ForMaskedLM": "masked_token", "ForSequenceClassification": "scored"}
_POOLER = "add_pooling_layer"
"""Transformers' classes take it as an argument and its files do not tell; ours do."""


def read_bert(values: Values) -> dict[str, Any]:
    """The fields behind a BERT's config.json."""
    return _read(values, ("Bert",), eps=1e-12)


def write_bert(fields: Values) -> dict[str, Any]:
    """A BERT's config.json."""
    return _write(fields, "Bert", "bert") | {"pad_token_id": None}


def read_roberta(values: Values) -> dict[str, Any]:
    """The fields behind a RoBERTa's or XLM-RoBERTa's config.json: places begin after the padding token's number."""
    padding = values.get("pad_token_id", 1)
    if not isinstance(padding, int) or isinstance(padding, bool) or padding < 0:
        raise ConfigError(f"config.json: pad_token_id is a token id, got {padding!r}", key="pad_token_id")
    fields = _read(values, ("Roberta", "XLMRoberta"), eps=1e-12)
    offset = padding + 1
    if fields["max_positions"] <= offset:
        raise ConfigError(
            f"config.json: max_position_embeddings is above pad_token_id + 1 = {offset}, got {fields['max_positions']}",
            key="max_position_embeddings",
        )
    return fields | {
        "max_positions": fields["max_positions"] - offset,
        "positions": PositionConfig("learned", offset=offset),
    }


def write_roberta(fields: Values) -> dict[str, Any]:
    """A RoBERTa's config.json."""
    offset = fields["positions"].offset
    return _write(fields, "Roberta", "roberta") | {
        "max_position_embeddings": fields["max_positions"] + offset,
        "pad_token_id": offset - 1,
    }


def read_distilbert(values: Values) -> dict[str, Any]:
    """The fields behind a DistilBERT's config.json, for its hidden states."""
    need(values, "vocab_size", "dim", "n_layers", "n_heads", "hidden_dim")
    require(values, {"sinusoidal_pos_embds": False})
    return {
        "vocab_size": size(values, "vocab_size"),
        **heads(size(values, "dim"), size(values, "n_heads")),
        "num_layers": size(values, "n_layers"),
        "intermediate_size": size(values, "hidden_dim"),
        "max_positions": size(values, "max_position_embeddings", 512),
        "norm_eps": 1e-12,
        "attention": AttentionConfig(causal=False, qkv_bias=True, out_bias=True),
        "positions": PositionConfig("learned"),
        "layers": _layers(choice(values, "activation", "gelu", ACTIVATIONS), 0),
        "task": choice({"of": _architecture(values, "DistilBertModel")}, "of", "", {"DistilBertModel": "hidden"}),
        **read_tokens(values),
    }


def write_distilbert(fields: Values) -> dict[str, Any]:
    """A DistilBERT's config.json."""
    return {
        **named("DistilBertModel", "distilbert"),
        "vocab_size": fields["vocab_size"],
        "dim": fields["hidden_size"],
        "n_layers": fields["num_layers"],
        "n_heads": fields["num_heads"],
        "hidden_dim": fields["intermediate_size"],
        "max_position_embeddings": fields["max_positions"],
        "activation": WRITTEN[fields["layers"].activation],
        "sinusoidal_pos_embds": False,
        "pad_token_id": None,
        **dict.fromkeys(("dropout", "attention_dropout"), 0.0),
        **write_tokens(fields),
    }


def _read(values: Values, classes: tuple[str, ...], *, eps: float) -> dict[str, Any]:
    need(values, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    require(values, {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False})
    known = {name + end: task for name in classes for end, task in _ENDS.items()}
    task = choice({"architectures": _architecture(values, classes[0] + "Model")}, "architectures", "", known)
    if task == "pooled" and not flag(values, _POOLER, default=True):
        task = "hidden"
    return {
        "vocab_size": size(values, "vocab_size"),
        **heads(size(values, "hidden_size"), size(values, "num_attention_heads")),
        "num_layers": size(values, "num_hidden_layers"),
        "intermediate_size": size(values, "intermediate_size"),
        "max_positions": size(values, "max_position_embeddings", 512),
        "norm_eps": number(values, "layer_norm_eps", eps),
        "tie_embeddings": flag(values, "tie_word_embeddings", default=True),
        "attention": AttentionConfig(causal=False, qkv_bias=True, out_bias=True),
        "positions": PositionConfig("learned"),
        "layers": _layers(choice(values, "hidden_act", "gelu", ACTIVATIONS), size(values, "type_vocab_size", 2)),
        "task": task,
        "num_labels": _labels(values) if task == "scored" else 0,
        **read_tokens(values),
    }


def _write(fields: Values, name: str, model_type: str) -> dict[str, Any]:
    ends: dict[str, str] = {task: end for end, task in _ENDS.items()}
    task, labels = fields["task"], range(fields["num_labels"])
    written = {
        **named(name + ends.get(task, "Model"), model_type),
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "num_hidden_layers": fields["num_layers"],
        "num_attention_heads": fields["num_heads"],
        "intermediate_size": fields["intermediate_size"],
        "max_position_embeddings": fields["max_positions"],
        "layer_norm_eps": fields["norm_eps"],
        "hidden_act": WRITTEN[fields["layers"].activation],
        "type_vocab_size": fields["layers"].token_types,
        "tie_word_embeddings": fields["tie_embeddings"],
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
        **write_tokens(fields),
    }
    if task == "hidden":
        written[_POOLER] = False
    if labels:
        written |= {
            "id2label": {str(label): f"LABEL_{label}" for label in labels},
            "label2id": {f"LABEL_{label}": label for label in labels},
        }
    return written


def _layers(activation: str, token_types: int) -> LayerConfig:
    return LayerConfig(
        norm="layer",
        norm_first=False,
        gated=False,
        activation=activation,  # type: ignore[arg-type]  # checked by the value
        mlp_bias=True,
        embedding_norm=True,
        token_types=token_types,
    )


def _architecture(values: Values, default: str) -> str:
    names = values.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else default


def _labels(values: Values) -> int:
    """How many there are: files name them, or count them, or mean two."""
    names = values.get("id2label")
    return len(names) if isinstance(names, dict) and names else size(values, "num_labels", 2)
