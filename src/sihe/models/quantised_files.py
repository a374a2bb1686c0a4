"""Folders of decoders with coded weights: `config.json` and `quantised.safetensors`.

The tensors have the names of the decoder's own state (`blocks.0.attention.qkv.codes`, `.step`, …; see `quantised` for
what they mean), as fused products are coded whole. The file's metadata hold one entry, `sihe.quantisation`, a JSON
object with `version` (1), `scheme` and `skip` (the modules that were left alone). A plain loader finds no
`model.safetensors` and says so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sihe.core.errors import ConfigError, CorruptData, InvalidInput, NotFound
from sihe.core.files import disk_errors, write_file
from sihe.models.checkpoint import CONFIG, load_config
from sihe.models.decoder import Decoder, empty_decoder
from sihe.models.errors import CheckpointMismatch
from sihe.models.quantised import SKIP, QuantisedLinear, replace_empty

QUANTISED_WEIGHTS = "quantised.safetensors"
_METADATA = "sihe.quantisation"
_VERSION = 1


def save_quantised(model: Decoder, folder: Path, skip: tuple[str, ...] = SKIP) -> None:
    """Writes a quantised `model`, its file whole or not at all; `skip` as it was given to `quantise`.

    Raises `InvalidInput` for a model that is not quantised or carries adapters, `NoSpace`.
    """
    schemes = {module.scheme for module in model.modules() if isinstance(module, QuantisedLinear)}
    if len(schemes) != 1:
        raise InvalidInput(f"one scheme of quantisation is expected in the model, got {sorted(schemes) or 'none'}")
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    if any(".lora." in name for name in tensors):
        raise InvalidInput("the model carries adapters: save them with save_adapter, detach them, and save the model")
    folder.mkdir(parents=True, exist_ok=True)
    target, staging = folder / QUANTISED_WEIGHTS, folder / f".{QUANTISED_WEIGHTS}.part"
    about = json.dumps({"version": _VERSION, "scheme": schemes.pop(), "skip": list(skip)})
    with disk_errors(target):
        try:
            save_file(tensors, staging, metadata={"format": "pt", _METADATA: about})
            with staging.open("rb") as file:
                os.fsync(file.fileno())
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    write_file(folder / CONFIG, json.dumps(model.config.to_hf(), indent=2).encode() + b"\n")


def load_quantised(folder: Path) -> Decoder:
    """The quantised model of a folder, on the CPU, frozen.

    Raises `NotFound`, `CorruptData`, `CheckpointMismatch` naming the tensor that does not fit.
    """
    path = folder / QUANTISED_WEIGHTS
    if not path.is_file():
        raise NotFound("quantised weights", str(path))
    model = empty_decoder(load_config(folder))
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            if about.get("version") != _VERSION:
                raise CorruptData(path, f"its {_METADATA} has version {about.get('version')!r}, and 1 is known")
            replace_empty(model, about["scheme"], tuple(about["skip"]))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError, TypeError, ConfigError) as error:
        raise CorruptData(path, str(error), hint="the file was cut short or changed: copy it again") from error
    _check(folder, model.state_dict(), found)
    model.load_state_dict(found, assign=True)
    return model.requires_grad_(False)


def _check(folder: Path, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CheckpointMismatch(folder, name, "is missing")
        if name not in expected:
            raise CheckpointMismatch(folder, name, f"is not used by a model of this {CONFIG}")
        ours, theirs = expected[name], found[name]
        if ours.shape != theirs.shape or ours.is_floating_point() != theirs.is_floating_point():
            reason = f"is {theirs.dtype} {list(theirs.shape)}, and {CONFIG} asks for {ours.dtype} {list(ours.shape)}"
            raise CheckpointMismatch(folder, name, reason)
