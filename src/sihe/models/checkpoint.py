"""Model folders: config.json and model.safetensors in the layouts of Hugging Face, read and written.

Reading memory-maps the files and copies each tensor to its place, so that the peak is the model plus one tensor. A
folder whose weights do not fit its configuration is refused whole: nothing is left at its random value. Only
safetensors is read; pickles can run code and are refused.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sihe.core.errors import CorruptData, NotFound
from sihe.core.files import disk_errors, write_file
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder, empty_decoder
from sihe.models.encoder import Encoder
from sihe.models.errors import CheckpointMismatch
from sihe.models.layouts import canonical, is_dispensable, is_head, repeats, slots
from sihe.models.transformer import Transformer

_Model = TypeVar("_Model", bound=Transformer)
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save_model(model: Transformer, folder: Path) -> None:
    """Writes `model` into `folder` in its own dtype, each file whole or not at all. Raises `NoSpace`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {slot.name: slot.stored().cpu() for slot in slots(model)}
    target, staging = folder / WEIGHTS, folder / f".{WEIGHTS}.part"
    with disk_errors(target):
        try:
            save_file(tensors, staging, metadata={"format": "pt"})
            with staging.open("rb") as file:
                os.fsync(file.fileno())
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    write_file(folder / CONFIG, json.dumps({**model.config.to_hf(), "dtype": dtype}, indent=2).encode() + b"\n")


def load_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder. Raises `NotFound`, `CorruptData`, `UnsupportedModel`, `ConfigError`."""
    path = folder / CONFIG
    if not path.is_file():
        raise NotFound("model folder", str(folder), hint=f"it must hold {CONFIG} and {WEIGHTS}")
    return ModelConfig.from_hf(_json(path))


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a folder, on the CPU, its weights as `dtype`.

    Raises `CheckpointMismatch` naming the tensor that is missing, unused or misshapen, `CorruptData` for a file that
    cannot be read, `ConfigError` for an encoder, and what `load_config` raises.
    """
    return _filled(empty_decoder(load_config(folder)), folder, dtype)


def load_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> Encoder:
    """The encoder of a folder, as `load_model` gives a decoder. Raises `ConfigError` for a decoder."""
    return _filled(_empty_encoder(load_config(folder)), folder, dtype)


def load_trunk(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of a folder for its hidden states, as `load_model` gives it: heads are neither needed nor read."""
    config = load_config(folder)
    if config.task == "next_token":
        return _filled(empty_decoder(replace(config, tie_embeddings=True)), folder, dtype, without_head=True)
    bare = replace(config, task="hidden", num_labels=0, tie_embeddings=True)
    return _filled(_empty_encoder(bare), folder, dtype, without_head=True)


def _empty_encoder(config: ModelConfig) -> Encoder:
    with torch.device("meta"):
        return Encoder(config)


def _filled(model: _Model, folder: Path, dtype: torch.dtype, *, without_head: bool = False) -> _Model:
    model = model.to(dtype).to_empty(device="cpu")
    with ExitStack() as open_files:
        found = {canonical(model, name): (file, name) for name, file in _open(folder, open_files).items()}
        for slot in slots(model):
            if slot.name not in found:
                raise CheckpointMismatch(folder, slot.name, "is missing")
            tensor = _read(folder, *found.pop(slot.name))
            if tuple(tensor.shape) != slot.shape:
                reason = f"has shape {list(tensor.shape)}, and {CONFIG} asks for {list(slot.shape)}"
                raise CheckpointMismatch(folder, slot.name, reason)
            if tensor.is_floating_point() != slot.view.is_floating_point():
                kind = "floating-point" if slot.view.is_floating_point() else "whole"
                raise CheckpointMismatch(folder, slot.name, f"holds {tensor.dtype}, not {kind} numbers")
            slot.fill(tensor)
        again = repeats(model)
        for name, (file, stored) in found.items():
            if without_head and is_head(name):
                continue
            repeated = name in again and torch.equal(_read(folder, file, stored).to(dtype), again[name])
            if not (repeated or is_dispensable(name)):
                raise CheckpointMismatch(folder, name, f"is not used by a model of this {CONFIG}")
    return model


def _open(folder: Path, open_files: ExitStack) -> dict[str, Any]:
    """Tensor name → open file, of one safetensors file or of the shards that an index lists."""
    if (folder / WEIGHTS).is_file():  # before the index, as transformers does
        names = [WEIGHTS]
    elif (folder / INDEX).is_file():
        weight_map = _json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CorruptData(folder / INDEX, "no 'weight_map' in it")
        names = sorted(set(map(str, weight_map.values())))
        if any(Path(name).name != name for name in names):
            raise CorruptData(folder / INDEX, "a shard lies outside the model folder")
    else:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        hint = "it has pickled weights only: save them as safetensors" if pickled else f"expected {WEIGHTS} or {INDEX}"
        raise NotFound("weights", str(folder), hint=hint)
    found: dict[str, Any] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CorruptData(folder, f"shard {name!r} is missing", hint="copy the folder again")
        try:
            file = open_files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CorruptData(
                path, str(error), hint="the file was cut short or is no safetensors: copy it again"
            ) from error
        found.update(dict.fromkeys(file.keys(), file))
    return found


def _read(folder: Path, file: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise CorruptData(folder, f"tensor {name!r}: {error}", hint="copy the folder again") from error
    return tensor


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptData(path, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CorruptData(path, "not a JSON object")
    return values
