"""Checkpoints: folders that are whole or absent, each file with its checksum, the newest valid one found again.

    step-00000100/
        model.safetensors       the weights
        optimizer.safetensors   master weights and moments
        state.json              step, next sample, what the run computes, checksums, and a digest of itself

There is no random state to keep: the weights start from the seed, the sample order is a function of seed and position,
and the model draws nothing. A damaged checkpoint is moved aside (`damaged-…`) and the next older one is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sihe.core.errors import CorruptData
from sihe.core.files import new_directory, sha256_of, write_file
from sihe.training.errors import WrongCheckpoint
from sihe.training.ports import Optimizer
from sihe.training.types import CheckpointSaved, CheckpointSkipped

_FORMAT = "sihe-checkpoint"
_FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what was written."""

    path: Path
    step: int
    next_sample: int

    def load_into(self, model: torch.nn.Module, optimizer: Optimizer) -> None:
        """Gives the weights to `model` and the state to `optimizer`. Raises `CorruptData`."""
        self.load_weights(model)
        optimizer.load_state_tensors(_load(self.path / _OPTIMIZER))

    def load_weights(self, model: torch.nn.Module) -> None:
        """Gives the weights to `model`. Raises `CorruptData`."""
        weights = _load(self.path / _MODEL)
        parameters = dict(model.named_parameters())
        if {name: tensor.shape for name, tensor in weights.items()} != {k: p.shape for k, p in parameters.items()}:
            raise CorruptData(self.path / _MODEL, "its tensors are not those of the model")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])


class Checkpoints:
    """The checkpoints of one run, under `folder`; the newest `keep` of them stay.

    `identity` says what the run computes. A checkpoint with another one is refused (`WrongCheckpoint`).
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, keep: int) -> None:
        self._folder = folder
        self._identity = json.loads(json.dumps(identity))  # as it comes back from a file
        self._keep = keep

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        if not self._folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, next_sample: int, model: torch.nn.Module, optimizer: Optimizer) -> CheckpointSaved:
        """Writes the checkpoint of `step` durably, then removes the ones that are too old. Raises `NoSpace`."""
        started = time.monotonic()
        path = self._path(step)
        with new_directory(path) as staging:
            save_file({name: parameter.detach() for name, parameter in model.named_parameters()}, staging / _MODEL)
            save_file(dict(optimizer.state_tensors()), staging / _OPTIMIZER)
            files = {name: sha256_of(staging / name) for name in (_MODEL, _OPTIMIZER)}
            body = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "step": step, "next_sample": next_sample}
            body |= {"identity": self._identity, "files": files}
            write_file(staging / _STATE, json.dumps({**body, "digest": _digest(body)}, indent=1).encode())
        self.prune(self._keep)
        size = sum(file.stat().st_size for file in path.iterdir())
        return CheckpointSaved(step, str(path), size, time.monotonic() - started)

    def newest(self, on_skip: Callable[[CheckpointSkipped], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole, or `None`; damaged ones are moved aside and reported.

        Raises `WrongCheckpoint` for a whole one of another run.
        """
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                return self._open(path)
            except CorruptData as error:
                on_skip(CheckpointSkipped(str(_move_aside(path)), error.reason))
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, which another rank has checked."""
        return self._open(self._path(step), verify=False)

    def prune(self, keep: int) -> None:
        """Removes all but the newest `keep`."""
        for step in self.steps()[:-keep]:
            # Renamed first: a reader sees a whole checkpoint or none while the files go.
            doomed = self._path(step).with_name(f".removed-{self._path(step).name}")
            shutil.rmtree(doomed, ignore_errors=True)
            self._path(step).rename(doomed)
            shutil.rmtree(doomed)
            doomed.with_name(f".{self._path(step).name}.lock").unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def _open(self, path: Path, *, verify: bool = True) -> Checkpoint:
        state = _read_state(path / _STATE)
        if verify:
            for name, digest in state["files"].items():
                file = path / name
                if not file.is_file():
                    raise CorruptData(file, "the file is missing")
                if sha256_of(file) != digest:
                    raise CorruptData(file, f"the SHA-256 of {name} is not that of what was written")
        theirs = state["identity"]
        if theirs != self._identity:
            keys = sorted(key for key in theirs | self._identity if theirs.get(key) != self._identity.get(key))
            raise WrongCheckpoint(path, {key: (theirs.get(key), self._identity.get(key)) for key in keys})
        return Checkpoint(path, state["step"], state["next_sample"])


def _read_state(path: Path) -> dict[str, Any]:
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
        digest = body.pop("digest")
    except FileNotFoundError as error:
        raise CorruptData(path, f"{_STATE} is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptData(path, f"{_STATE} is not what was written") from error
    if digest != _digest(body) or body["format"] != _FORMAT:
        raise CorruptData(path, f"{_STATE} does not match its digest")
    if body["format_version"] != _FORMAT_VERSION:
        raise CorruptData(path, f"its format version is {body['format_version']!r}, this Sihe reads {_FORMAT_VERSION}")
    return body


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptData(path, str(error)) from error


def _move_aside(path: Path) -> Path:
    """Gives a damaged checkpoint a name under which it is not found again."""
    targets: Iterable[Path] = (path.with_name(f"damaged-{path.name}-{number}") for number in range(1, 1_000_000))
    target = next(candidate for candidate in targets if not candidate.exists())
    return path.rename(target)
