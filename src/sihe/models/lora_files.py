"""Adapter folders in the layout of Hugging Face PEFT, read and written: `adapter_config.json` and
`adapter_model.safetensors` with tensors such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.

What an adapter of PEFT can be and ours cannot (DoRA, trained biases, ranks by layer) is refused by the name of its
setting, before any tensor is read. Pickled adapters are refused: reading them can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sihe.core.errors import ConfigError, CorruptData, NotFound
from sihe.core.files import write_file
from sihe.models.errors import CheckpointMismatch, UnsupportedAdapter
from sihe.models.lora import Lora
from sihe.models.lora_config import TARGETS, LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of PEFT that change what an adapter computes, and the values under which it computes what ours does.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "layer_replication": (None, []),
    "layers_to_transform": (None, []),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "exclude_modules": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


def save_adapter(lora: Lora, name: str, folder: Path, *, base_model: str | None = None) -> None:
    """Writes the adapter `name` into `folder`; `base_model` says in the file which model it was trained on.

    Raises `NotFound` for the name, `NoSpace`.
    """
    config = lora.config(name)
    tensors = {}
    for matrix, a, b in lora.matrices(name):
        tensors[f"{_PREFIX}{matrix}.lora_A.weight"] = a.detach().contiguous().cpu()
        tensors[f"{_PREFIX}{matrix}.lora_B.weight"] = b.detach().contiguous().cpu()
    write_file(folder / ADAPTER_WEIGHTS, save(tensors, metadata={"format": "pt"}))
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_file(folder / ADAPTER_CONFIG, json.dumps(values, indent=2).encode() + b"\n")


def load_lora_config(folder: Path) -> LoraConfig:
    """The settings of an adapter folder. Raises `NotFound`, `CorruptData`, `UnsupportedAdapter`, `ConfigError`."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise NotFound("adapter folder", str(folder), hint=f"it must hold {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptData(path, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CorruptData(path, "not a JSON object")
    if values.get("peft_type") != "LORA":
        raise UnsupportedAdapter("peft_type", values.get("peft_type"), "'LORA'")
    for key, neutral in _NEUTRAL.items():
        if key in values and values[key] not in neutral:
            raise UnsupportedAdapter(key, values[key], " or ".join(map(repr, neutral)))
    try:
        return LoraConfig(
            rank=values["r"],
            alpha=float(values["lora_alpha"]),
            dropout=float(values.get("lora_dropout", 0.0)),
            targets=_targets(values),
            rslora=bool(values.get("use_rslora", False)),
        )
    except (ConfigError, UnsupportedAdapter):
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptData(path, f"a setting is missing or of the wrong kind: {error!r}") from error


def load_adapter(lora: Lora, folder: Path, name: str) -> None:
    """Adds the adapter of `folder` to `lora` as `name`; `Lora.use` makes it the active one.

    Raises `CheckpointMismatch` naming the tensor that is missing, unused or misshapen, `CorruptData` for a file that
    cannot be read, and what `load_lora_config` and `Lora.add` raise. Nothing is added then.
    """
    config = load_lora_config(folder)
    lora.add(name, config)
    try:
        _fill(lora, name, folder)
    except BaseException:
        lora.remove(name)
        raise


def _fill(lora: Lora, name: str, folder: Path) -> None:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = "it holds a pickled adapter only: save it as safetensors" if any(folder.glob("*.bin")) else ""
        raise NotFound("adapter weights", str(path), hint=pickled)
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            unused = set(file.keys())
            for matrix, *pair in lora.matrices(name):
                for letter, ours in zip("AB", pair, strict=True):
                    tensor = f"{_PREFIX}{matrix}.lora_{letter}.weight"
                    if tensor not in unused:
                        raise CheckpointMismatch(folder, tensor, "is missing")
                    theirs = file.get_tensor(tensor)
                    if theirs.shape != ours.shape:
                        reason = f"has shape {list(theirs.shape)}, and the model asks for {list(ours.shape)}"
                        raise CheckpointMismatch(folder, tensor, reason)
                    ours.copy_(theirs)
                    unused.remove(tensor)
    except (SafetensorError, OSError) as error:
        raise CorruptData(
            path, str(error), hint="the file was cut short or is no safetensors: copy it again"
        ) from error
    if unused:
        raise CheckpointMismatch(folder, min(unused), f"is not used by an adapter of this {ADAPTER_CONFIG}")


def _targets(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The matrices in our order; a full module name counts by its last component."""
    named = values["target_modules"]
    if named == "all-linear":
        return TARGETS
    if isinstance(named, str):
        raise UnsupportedAdapter("target_modules", named, "a list of names or 'all-linear'")
    last = {str(target).rpartition(".")[2] for target in named}
    unknown = sorted(last - set(TARGETS))
    if unknown:
        raise UnsupportedAdapter("target_modules", unknown, f"those among {', '.join(TARGETS)}")
    return tuple(target for target in TARGETS if target in last)
