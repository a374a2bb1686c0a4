"""The checkpoints of one run: written beside the training, found again, and the oldest removed."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sihe.core.errors import CorruptData
from sihe.core.files import new_directory
from sihe.core.telemetry import logger
from sihe.training.checkpoint.agreement import Agreement
from sihe.training.checkpoint.manifest import Manifest
from sihe.training.checkpoint.shards import Form, read_forms, read_tensors, write_tensors
from sihe.training.checkpoint.snapshot import HostBuffers
from sihe.training.errors import WrongCheckpoint
from sihe.training.ranks import Ranks
from sihe.training.types import CheckpointSaved, CheckpointSkipped

if TYPE_CHECKING:
    from sihe.training.ports import Optimizer

_NAME = re.compile(r"step-(\d{8,})")
_WEIGHT, _AVERAGE, _RANK = "weight.", "average.", "rank."
_log = logger(__name__)
_LISTED = 8  # differences in a message


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what was written."""

    path: Path
    manifest: Manifest
    agreement: Agreement

    @property
    def step(self) -> int:
        """Steps that were done."""
        return self.manifest.step

    @property
    def next_sample(self) -> int:
        """Where the order of samples goes on."""
        return self.manifest.next_sample

    def load_into(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        more: Mapping[str, Tensor] | None = None,
        of_rank: Mapping[str, Tensor] | None = None,
    ) -> bool:
        """Gives back what `Checkpoints.save` took: each rank reads its parts, whatever the plan they came from.

        `of_rank` is given back to the very ranks that wrote it, all of them or none: whether it was, the same on each
        rank. Else it is left as it is, for the caller to start anew, and a warning is logged.

        All ranks that opened the checkpoint call it. Raises `WrongCheckpoint` naming the tensors that only one side
        has, or that have another form (nothing has changed then), `CorruptData`, `PeerFailed`, `PeerSilent`.
        """
        own = optimizer.state_tensors()
        tensors = _contents(model, own, more, _named(of_rank, self.agreement))
        forms = {name: Form.of(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        wanted = {name: form for share in self.agreement.everywhere(lambda: forms) for name, form in share.items()}
        stored = self.agreement.everywhere(lambda: read_forms(self.path))[self.agreement.rank]
        is_own = _of_ranks(wanted) == _of_ranks(stored)
        if not is_own:
            _log.warning("rank_state_starts_anew", checkpoint=str(self.path), reason="written by other ranks")
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_RANK)}
            wanted, stored = ({n: f for n, f in each.items() if not n.startswith(_RANK)} for each in (wanted, stored))
        self.agreement.everywhere(lambda: self._check(wanted, stored))
        self.agreement.everywhere(lambda: read_tensors(self.path, tensors))
        optimizer.load_state_tensors({name: tensors[name] for name in own})
        return is_own

    def load_weights(self, model: nn.Module, *, averaged: bool = False) -> None:
        """Gives the weights to the whole `model` in this process, rounded to its dtype. Raises as `load_into`.

        With `averaged` those that are trained come from their running average.
        """
        stored = read_forms(self.path)
        own = {name: parameter for name, parameter in model.named_parameters() if averaged and parameter.requires_grad}
        parameters = {(_AVERAGE if name in own else _WEIGHT) + name: p for name, p in model.named_parameters()}
        kept = {name: form for name, form in stored.items() if name.startswith(_AVERAGE if own else _WEIGHT)}
        kept |= {name: form for name, form in stored.items() if name in parameters}
        self._check({n: Form.of(p.shape, _dtype(kept.get(n), p)) for n, p in parameters.items()}, kept)
        weights = {n: torch.empty(p.shape, dtype=_dtype(kept.get(n), p)) for n, p in parameters.items()}
        read_tensors(self.path, weights)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])

    def _check(self, wanted: Mapping[str, Form], stored: Mapping[str, Form]) -> None:
        names = sorted(name for name in {*wanted, *stored} if wanted.get(name) != stored.get(name))
        if names:
            forms = {name: (_shown(stored.get(name)), _shown(wanted.get(name))) for name in names[:_LISTED]}
            raise WrongCheckpoint(self.path, forms)


class Checkpoints:
    """The checkpoints of one run, under `folder`; the newest `keep` of them stay.

    `identity` says what the run computes; a checkpoint with another one is refused. With `ranks`, all of them make
    this together and call `save`, `finish` and `newest` at the same points; without, a single process has all of it.
    With `background`, `save` returns as soon as a copy is in host memory and a thread writes it.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        keep: int,
        ranks: Ranks | None = None,
        background: bool = False,
    ) -> None:
        self._folder = folder
        self._identity = json.loads(json.dumps(identity))  # as it comes back from a file
        self._keep = keep
        self._agreement = Agreement(ranks or Ranks())
        self._buffers = HostBuffers()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._writing: Future[CheckpointSaved] | None = None
        self._reserving: Future[dict[str, Tensor]] | None = None
        self._saved: list[CheckpointSaved] = []

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        if not self._folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def reserve(self, model: nn.Module, optimizer: Optimizer, more: Mapping[str, Tensor] | None = None) -> None:
        """Makes the buffers in the background, so that the first `save` is as quick as the later ones."""
        if self._writer is not None:
            self._reserving = self._writer.submit(self._buffers.copy, _contents(model, optimizer.state_tensors(), more))

    def save(
        self,
        step: int,
        next_sample: int,
        model: nn.Module,
        optimizer: Optimizer,
        more: Mapping[str, Tensor] | None = None,
        *,
        of_rank: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
        extras: Any = None,
    ) -> None:
        """Writes the checkpoint of `step` durably, then removes the ones that are too old.

        It holds the tensors of the optimizer (with the weights that it moves), the parameters of `model` that need no
        gradient, `more`, and `of_rank`, which no other rank shares. `state`, the same on every rank, and `extras`,
        this rank's own, are what JSON can hold.

        Raises `NoSpace`, `PeerSilent` and `PeerFailed`: of this checkpoint, or in the background of the one before,
        for which it waits. What was there stays, and nothing is half there.
        """
        self.finish()
        if self._reserving is not None:
            self._reserving.result()  # two at once would copy into the same buffers
            self._reserving = None
        tensors = _contents(model, optimizer.state_tensors(), more, _named(of_rank, self._agreement))
        plain = json.loads(json.dumps({"state": state or {}, "extras": extras}))
        if self._writer is None:
            self._saved.append(self._write(step, next_sample, tensors, **plain))
        else:
            copies = self._buffers.copy(tensors)
            self._writing = self._writer.submit(self._write, step, next_sample, copies, **plain)

    def finish(self) -> None:
        """Waits until the checkpoint that is being written is there. Raises what went wrong with it, as `save`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._saved.append(writing.result())

    def completed(self) -> list[CheckpointSaved]:
        """The checkpoints that came to be since the last call, each once; waits for none."""
        if self._writing is not None and self._writing.done() and self._writing.exception() is None:
            self.finish()
        saved, self._saved = self._saved, []
        return saved

    def newest(self, on_skip: Callable[[CheckpointSkipped], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole, the same on all ranks, or `None`; each of them checks some of the files.

        Damaged ones are moved aside, and reported on every rank. Raises `WrongCheckpoint` for a whole one of another
        run, `PeerSilent`, and what `finish` raises.
        """
        self.finish()
        for step in reversed(self._agreement.from_first(self._tidied)):
            path = self._path(step)
            damages = self._agreement.everywhere(partial(self._damage, path))
            damage = next(filter(None, damages), None)
            if damage is None:
                return self._opened(path, self._agreement)
            aside = self._agreement.from_first(partial(_move_aside, path))
            on_skip(CheckpointSkipped(aside, damage))
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, for this process alone. Raises `CorruptData`, `WrongCheckpoint`."""
        path = self._path(step)
        Manifest.read(path).check_files(path)
        return self._opened(path, Agreement(Ranks()))

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

    def _write(
        self, step: int, next_sample: int, tensors: Mapping[str, Tensor], *, state: Mapping[str, Any], extras: Any
    ) -> CheckpointSaved:
        """One rank's part of writing a checkpoint; the first rank makes the folder, and gives it its name."""
        started = time.monotonic()
        path, agreement = self._path(step), self._agreement
        with ExitStack() as first_only:
            staging = Path(agreement.from_first(lambda: str(first_only.enter_context(new_directory(path)))))
            own = write_tensors(staging, tensors, agreement)
            parts = agreement.everywhere(lambda: (own, extras))
            files = {name: one for sums, _ in parts for name, one in sums.items()}
            manifest = Manifest(step, next_sample, self._identity, files, state, [extra for _, extra in parts])
            agreement.from_first(lambda: manifest.write(staging))
            agreement.from_first(first_only.close)
        agreement.from_first(lambda: self.prune(self._keep))
        size = sum(file.stat().st_size for file in path.iterdir())
        return CheckpointSaved(step, str(path), size, time.monotonic() - started)

    def _tidied(self) -> list[int]:
        """The steps that have a checkpoint, once what a killed writer left is gone."""
        for pattern in (".step-*.tmp-*", ".removed-*"):
            for leftover in self._folder.glob(pattern):
                shutil.rmtree(leftover)
        return self.steps()

    def _damage(self, path: Path) -> str | None:
        """What is wrong with the checkpoint, as far as this rank's share of the files shows."""
        try:
            share, shares = self._agreement.rank, self._agreement.world_size
            Manifest.read(path).check_files(path, share=share, shares=shares)
        except CorruptData as error:
            return error.reason
        return None

    def _opened(self, path: Path, agreement: Agreement) -> Checkpoint:
        manifest = Manifest.read(path)
        theirs, ours = manifest.identity, self._identity
        if theirs != ours:
            keys = sorted(key for key in theirs | ours if theirs.get(key) != ours.get(key))
            raise WrongCheckpoint(path, {key: (theirs.get(key), ours.get(key)) for key in keys})
        return Checkpoint(path, manifest, agreement)


def _contents(
    model: nn.Module,
    own: Mapping[str, Tensor],
    more: Mapping[str, Tensor] | None,
    of_rank: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Everything that a checkpoint holds: the live tensors by name."""
    frozen = {_WEIGHT + name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return {**frozen, **own, **(more or {}), **(of_rank or {})}


def _named(of_rank: Mapping[str, Tensor] | None, agreement: Agreement) -> dict[str, Tensor]:
    """What is one rank's own, by names that no other rank uses, nor the same rank among another number of them."""
    return {f"{_RANK}{agreement.rank}of{agreement.world_size}.{n}": tensor for n, tensor in (of_rank or {}).items()}


def _of_ranks(forms: Mapping[str, Form]) -> dict[str, Form]:
    return {name: form for name, form in forms.items() if name.startswith(_RANK)}


def _dtype(form: Form | None, parameter: Tensor) -> torch.dtype:
    """That of a stored weight; of the model's own where there is none, which is then the difference that is named."""
    dtype = getattr(torch, form.dtype) if form is not None else parameter.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _shown(form: Form | None) -> str:
    return "absent" if form is None else str(form)


def _move_aside(path: Path) -> str:
    """Gives a damaged checkpoint a name under which it is not found again."""
    targets = (path.with_name(f"damaged-{path.name}-{number}") for number in range(1, 1_000_000))
    return str(path.rename(next(candidate for candidate in targets if not candidate.exists())))
