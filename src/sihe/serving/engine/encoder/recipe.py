"""What stands around a model that makes embeddings: how its tokens become one vector, and what stands before a text.

Reads the layout of sentence-transformers (https://sbert.net, `modules.json` and what it names): a transformer, a
pooling, dense layers, a normalisation. A folder without it is pooled by the mean of its tokens, as that library does;
its vectors are brought to length 1, as OpenAI's are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sihe.core.errors import ConfigError, CorruptData
from sihe.models.errors import UnsupportedModel

Pooling = Literal["cls", "mean", "last", "max", "mean_sqrt", "weighted"]
MODULES = "modules.json"

_FLAGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt",
    "pooling_mode_weightedmean_tokens": "weighted",
    "pooling_mode_lasttoken": "last",
}
_NAMES: dict[str, Pooling] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt",
    "weightedmean": "weighted",
    "lasttoken": "last",
}
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU")


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A linear map over the pooled vector, `activation` of torch.nn after it; its weights lie in `folder`."""

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """From hidden states to a vector. `folder` has the transformer's files; `max_tokens` is the longest text."""

    folder: Path
    pooling: Pooling = "mean"
    layers: tuple[DenseLayer, ...] = ()
    normalise: bool = True
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    pools_prompt: bool = True


def is_sentence_transformer(folder: Path) -> bool:
    """Whether the folder says itself how it makes embeddings."""
    return (folder / MODULES).is_file()


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a model folder. Raises `CorruptData`, `ConfigError`, and `UnsupportedModel` for other modules."""
    if not is_sentence_transformer(folder):
        return Recipe(folder)
    modules = _modules(folder)
    if not modules or modules[0][0] != "Transformer":
        raise UnsupportedModel(MODULES, [kind for kind, _ in modules], "a Transformer first")
    root = modules[0][1]
    pooling: Pooling | None = None
    pools_prompt, normalise, layers = True, False, []
    for kind, path in modules[1:]:
        if kind == "Pooling" and pooling is None:
            values = _json(path / "config.json")
            pooling, pools_prompt = _pooling(values), bool(values.get("include_prompt", True))
        elif kind == "Dense" and pooling is not None and not normalise:
            layers.append(_dense(path))
        elif kind == "Normalize" and pooling is not None:
            normalise = True
        else:
            raise UnsupportedModel(MODULES, kind, "a Transformer, a Pooling, Dense layers and a Normalize, in order")
    if pooling is None:
        raise UnsupportedModel(MODULES, [kind for kind, _ in modules], "a Pooling")
    limits = _json(root / "sentence_bert_config.json", optional=True)
    texts = _json(folder / "config_sentence_transformers.json", optional=True)
    prompts, default = _prompts(texts.get("prompts")), texts.get("default_prompt_name")
    if default is not None and not (isinstance(default, str) and default in prompts):
        raise ConfigError(
            f"config_sentence_transformers.json: default_prompt_name is one of its prompts "
            f"({', '.join(prompts) or 'none'}), got {default!r}",
            key="default_prompt_name",
        )
    return Recipe(
        folder=root,
        pooling=pooling,
        layers=tuple(layers),
        normalise=normalise,
        max_tokens=_limit(limits.get("max_seq_length")),
        lower_case=bool(limits.get("do_lower_case", False)),
        prompts=prompts,
        default_prompt=default,
        pools_prompt=pools_prompt,
    )


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Each module's kind and folder."""
    path = folder / MODULES
    entries = _read(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CorruptData(path, "not a list of modules")
    found = []
    for entry in entries:
        place = (folder / str(entry.get("path", ""))).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise CorruptData(path, f"module {entry.get('path')!r} lies outside the model folder")
        found.append((str(entry.get("type", "")).rpartition(".")[2], place))
    return found


def _pooling(values: Mapping[str, Any]) -> Pooling:
    mode = values.get("pooling_mode")
    chosen = [mode] if isinstance(mode, str) else mode
    if chosen is None:
        chosen = [name for name in _FLAGS if values.get(name)]
    known = _FLAGS | _NAMES
    names = [known.get(str(name)) for name in chosen] if isinstance(chosen, list) else [None]
    if len(names) != 1 or names[0] is None:
        raise UnsupportedModel("pooling_mode", chosen, "one of " + ", ".join(_NAMES))
    return names[0]


def _dense(path: Path) -> DenseLayer:
    values = _json(path / "config.json")
    activation = str(values.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise UnsupportedModel("activation_function", activation, " or ".join(_ACTIVATIONS))
    sizes = [values.get(name) for name in ("in_features", "out_features")]
    for name, size in zip(("in_features", "out_features"), sizes, strict=True):
        if _limit(size) is None:
            raise ConfigError(f"{path.name}/config.json: {name} is a positive whole number, got {size!r}", key=name)
    return DenseLayer(path, int(sizes[0] or 0), int(sizes[1] or 0), bool(values.get("bias", True)), activation)


def _prompts(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ConfigError(
            f"config_sentence_transformers.json: prompts map names to texts, got {value!r}", key="prompts"
        )
    return {str(name): text for name, text in value.items()}


def _limit(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    values = _read(path)
    if not isinstance(values, dict):
        raise CorruptData(path, "not a JSON object")
    return values


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CorruptData(path, f"{MODULES} names it, and it cannot be read: {error}") from error
    except ValueError as error:
        raise CorruptData(path, f"not JSON: {error}") from error
