"""The tensors of a checkpoint on disk: torch's distributed checkpoint (DCP), with our checksums and our fsync.

Each rank writes what it holds into one file; what several ranks hold is written by one of them, spread evenly. A part
of a tensor carries its place in the whole, so that ranks of any number, under any plan, read what they need.

`.metadata`, which says what lies where, is a pickle: whoever can write it can run code in the reader. A checksum
protects from damage, not from malice, so a checkpoint is as trusted as the folder of its run, and is verified before
any of this reads it. The tensors themselves are read as plain data.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

# Without a process group, the public functions warn on every call, in whichever thread: these are what they call.
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from sihe.core.errors import CorruptData
from sihe.core.files import disk_errors, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from sihe.training.checkpoint.agreement import Agreement

_BUFFER_BYTES = 1 << 20  # small records share a system call, and a checksum call that lets other threads run


@dataclass(frozen=True)
class FileSum:
    """What a file must be."""

    sha256: str
    size_bytes: int

    def check(self, path: Path) -> None:
        """Raises `CorruptData` when the file at `path` is something else."""
        if not path.is_file():
            raise CorruptData(path, f"{path.name} is missing")
        if (size := path.stat().st_size) != self.size_bytes:
            raise CorruptData(path, f"{path.name} has {size} bytes, {self.size_bytes} were written")
        if sha256_of(path) != self.sha256:
            raise CorruptData(path, f"the SHA-256 of {path.name} is not that of what was written")


@dataclass(frozen=True)
class Form:
    """Shape of the whole tensor, and dtype."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype) -> Form:
        """The form in plain values."""
        return cls(tuple(shape), str(dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], agreement: Agreement) -> dict[str, FileSum]:
    """Writes the tensors of all ranks into `folder`, durably; the sums of the files that this rank wrote.

    All ranks call it, each with what it holds. Raises on all of them what went wrong on any: `NoSpace`, `PeerSilent`.
    """
    files = _SummingFiles()
    writer = FileSystemWriter(folder, sync_files=False)  # its fsync comes before the last bytes leave the buffer
    writer.fs = files
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with disk_errors(folder), _plain_errors(), agreement.waiting():
        group = agreement.group
        _save_state_dict(dict(tensors), writer, process_group=group, no_dist=group is None, planner=planner)
    return files.sums


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Overwrites `tensors`, in place, by their parts of what `folder` holds, which was verified; any rank on its own.

    Names and forms are those of the checkpoint. Raises `CorruptData`.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _plain_errors(), torch.no_grad():
            _load_state_dict(dict(tensors), FileSystemReader(folder), no_dist=True, planner=planner)
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise CorruptData(folder, f"its tensors cannot be read: {error}") from error


def read_forms(folder: Path) -> dict[str, Form]:
    """Every tensor in `folder`, which was verified."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name: Form.of(entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


class _SummingFile(io.BufferedWriter):
    """A file that sums what goes through it, so that it need not be read again, and is durable once it is closed."""

    def __init__(self, path: Path, on_close: Callable[[FileSum], None]) -> None:
        super().__init__(io.FileIO(path, "w"), _BUFFER_BYTES)
        self._sha256 = hashlib.sha256()
        self._on_close = on_close

    def write(self, data: Any) -> int:
        """Appends `data`; nothing seeks in a file that is being written."""
        self._sha256.update(data)
        return super().write(data)

    def close(self) -> None:
        """Makes the content durable, and gives away its sum; once."""
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
            self._on_close(FileSum(self._sha256.hexdigest(), self.tell()))
        finally:
            super().close()


class _SummingFiles(FileSystem):
    """The local file system as DCP sees it; remembers the sum of each file that is written."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Opens a file for DCP."""
        if mode == "wb":
            with _SummingFile(Path(path), partial(self.sums.__setitem__, Path(path).name)) as file:
                yield file
        else:
            with super().create_stream(path, mode) as stream:
                yield stream

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Renames a file that was written."""
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns DCP's bundle of all ranks' errors, which is no `Exception`, into the first of them."""
    try:
        yield
    except CheckpointException as bundle:
        rank = min(bundle.failures)
        raise bundle.failures[rank][0] from bundle
