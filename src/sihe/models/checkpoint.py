"""Model folders: config.json and model.safetensors in the layout of a Hugging Face Llama, read and written.

Reading memory-maps the files and copies each tensor to its place, so that the peak is the model plus one tensor. A
folder whose weights do not fit its configuration is refused whole: nothing is left at its random value. Only
safetensors is read; pickles can run code and are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sihe.core.errors import CorruptData, NotFound
from sihe.core.files import disk_errors, write_file
from sihe.models.attention import Attention
from sihe.models.config import ModelConfig
from sihe.models.decoder import Block, Decoder, empty_decoder
from sihe.models.errors import CheckpointMismatch
from sihe.models.mlp import GatedMLP
from sihe.models.moe import MixtureOfExperts

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DERIVED = ".rotary_emb.inv_freq"  # old Llama checkpoints carry the angles, which follow from rope_theta


@dataclass(frozen=True)
class _Slot:
    """A tensor of the checkpoint and the part of our weights that it is: `view` reshaped to `shape`."""

    name: str
    shape: tuple[int, ...]
    view: Tensor


def save_model(model: Decoder, folder: Path) -> None:
    """Writes `model` into `folder` in its own dtype, each file whole or not at all. Raises `NoSpace`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {slot.name: slot.view.detach().reshape(slot.shape).contiguous().cpu() for slot in _slots(model)}
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
    """The model of a folder, on the CPU, its weights as `dtype`.

    Raises `CheckpointMismatch` naming the tensor that is missing, unused or misshapen, `CorruptData` for a file that
    cannot be read, and what `load_config` raises.
    """
    config = load_config(folder)
    model = empty_decoder(config).to(dtype).to_empty(device="cpu")
    with ExitStack() as open_files:
        found = _open(folder, open_files)
        for slot in _slots(model):
            if slot.name not in found:
                raise CheckpointMismatch(folder, slot.name, "is missing")
            tensor = _read(folder, found.pop(slot.name), slot.name)
            if tuple(tensor.shape) != slot.shape:
                reason = f"has shape {list(tensor.shape)}, and {CONFIG} asks for {list(slot.shape)}"
                raise CheckpointMismatch(folder, slot.name, reason)
            if tensor.is_floating_point() != slot.view.is_floating_point():
                kind = "floating-point" if slot.view.is_floating_point() else "whole"
                raise CheckpointMismatch(folder, slot.name, f"holds {tensor.dtype}, not {kind} numbers")
            with torch.no_grad():
                slot.view.copy_(tensor.reshape(slot.view.shape))
        for name, file in found.items():
            repeats = name == "lm_head.weight" and torch.equal(
                _read(folder, file, name).to(dtype), model.embedding.weight
            )
            if not (repeats or name.endswith(_DERIVED)):
                raise CheckpointMismatch(folder, name, f"is not used by a model of this {CONFIG}")
    return model


def _slots(model: Decoder) -> Iterator[_Slot]:
    """Every tensor of the checkpoint, in order, with its place in the model."""
    yield _whole("model.embed_tokens.weight", model.embedding.weight)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        prefix = f"model.layers.{layer}"
        yield _whole(f"{prefix}.input_layernorm.weight", block.attention_norm.weight)
        yield from _attention_slots(f"{prefix}.self_attn", block.attention)
        yield _whole(f"{prefix}.post_attention_layernorm.weight", block.mlp_norm.weight)
        if isinstance(block.mlp, MixtureOfExperts):
            yield from _mixture_slots(f"{prefix}.block_sparse_moe", block.mlp)
        else:
            yield from _mlp_slots(f"{prefix}.mlp", block.mlp)
    yield _whole("model.norm.weight", model.norm.weight)
    if model.head is not None:
        yield _whole("lm_head.weight", model.head.weight)


def _attention_slots(prefix: str, attention: Attention) -> Iterator[_Slot]:
    weight = attention.qkv.weight
    rows_KGHD = weight.view(attention.num_kv_heads, attention.group + 2, attention.head_dim, weight.shape[1])
    parts = zip("qkv", torch.split(rows_KGHD, [attention.group, 1, 1], dim=1), strict=True)
    for letter, view in parts:
        yield _Slot(f"{prefix}.{letter}_proj.weight", (view.shape[:3].numel(), weight.shape[1]), view)
    yield _whole(f"{prefix}.o_proj.weight", attention.out.weight)


def _mlp_slots(prefix: str, mlp: GatedMLP) -> Iterator[_Slot]:
    gate, up = mlp.gate_up.weight
    yield _whole(f"{prefix}.gate_proj.weight", gate)
    yield _whole(f"{prefix}.up_proj.weight", up)
    yield _whole(f"{prefix}.down_proj.weight", mlp.down.weight)


def _mixture_slots(prefix: str, mixture: MixtureOfExperts) -> Iterator[_Slot]:
    yield _whole(f"{prefix}.gate.weight", mixture.router.weight)
    for expert in range(mixture.num_experts):
        gate, up = mixture.gate_up[expert]
        yield _whole(f"{prefix}.experts.{expert}.w1.weight", gate)
        yield _whole(f"{prefix}.experts.{expert}.w2.weight", mixture.down[expert])
        yield _whole(f"{prefix}.experts.{expert}.w3.weight", up)
    if mixture.shared is not None:
        yield from _mlp_slots(f"{prefix}.shared_expert", mixture.shared)
    if mixture.balance_steps is not None:
        yield _whole(f"{prefix}.gate.balance_steps", mixture.balance_steps)


def _whole(name: str, weight: Tensor) -> _Slot:
    return _Slot(name, tuple(weight.shape), weight)


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
