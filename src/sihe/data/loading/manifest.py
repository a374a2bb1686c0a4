"""`dataset.json`: what a token data set says about itself.

A data set is a folder that never changes once it has its name:

    dataset.json             this manifest, with a digest of its own content
    train-00000.bin …        little-endian token ids, nothing else: a file maps straight into memory
    held_out-00000.bin …
    tokenizer.json …         what turns the ids back into text; every file's SHA-256 stands in the manifest
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sihe.core.errors import CorruptData, InvalidInput, NotFound

FILE_NAME = "dataset.json"
FORMAT = "sihe-tokens"
FORMAT_VERSION = 1

Split = Literal["train", "held_out"]
TokenType = Literal["uint16", "uint32"]
_TOKEN_BYTES: Mapping[str, int] = {"uint16": 2, "uint32": 4}
_DAMAGED = "delete the folder and prepare the data set again"


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class DatasetManifest:
    """The content of `dataset.json`."""

    name: str
    version: str
    dtype: TokenType
    vocab_size: int
    eos_token_id: int
    splits: Mapping[Split, tuple[Shard, ...]]
    files: Mapping[str, str]  # every other file of the folder → its SHA-256
    created_at: str  # ISO 8601, UTC
    lineage: tuple[str, ...] = ()
    report: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # what was counted on the way
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """How lineage and pages name it: `dataset:stdlib@3f2a…`."""
        return f"dataset:{self.name}@{self.version}"

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes on disk."""
        return _TOKEN_BYTES[self.dtype]

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """The type of the ids in the shards, whatever the byte order of this machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    def num_tokens(self, split: Split) -> int:
        """Tokens in a split."""
        return sum(shard.tokens for shard in self.splits[split])

    def to_json(self) -> bytes:
        """The bytes of `dataset.json`."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**body, "digest": _digest(body)}, ensure_ascii=False, indent=1).encode() + b"\n"


def token_type(vocab_size: int) -> TokenType:
    """The narrowest type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def check_ids(tokens: np.ndarray, manifest: DatasetManifest, source: Path | str) -> None:
    """Raises `CorruptData` that names `source` when one of its `tokens` is not in the vocabulary."""
    highest = int(tokens.max()) if tokens.size else 0
    if highest >= manifest.vocab_size:
        reason = f"it holds the token id {highest:,} and the vocabulary has {manifest.vocab_size:,} ids"
        raise CorruptData(source, reason, hint=_DAMAGED)


def split_named(name: str) -> Split:
    """`name` as a split. Raises `InvalidInput`."""
    for split in get_args(Split):
        if name == split:
            return split
    raise InvalidInput(f"a data set has the splits {' and '.join(get_args(Split))}, got {name!r}")


def read_manifest(folder: Path) -> DatasetManifest:
    """The manifest of the data set in `folder`. Raises `NotFound`, `CorruptData`."""
    path = folder / FILE_NAME
    try:
        body = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(
            "data set", str(folder), hint=f"it has no {FILE_NAME}; make one with  sihe text prepare"
        ) from error
    except ValueError as error:  # malformed JSON or UTF-8
        raise CorruptData(path, "it is not JSON", hint=_DAMAGED) from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CorruptData(path, f"its format is not {FORMAT!r}", hint=_DAMAGED)
    if body.get("format_version") != FORMAT_VERSION:
        raise InvalidInput(
            f"{path} has format version {body.get('format_version')!r} and this Sihe reads {FORMAT_VERSION}: "
            "prepare the data set again, or use the Sihe that wrote it"
        )
    if body.pop("digest", None) != _digest(body):
        raise CorruptData(path, "its content does not match its digest", hint=_DAMAGED)
    del body["format"], body["format_version"]
    body["splits"] = {name: tuple(Shard(**shard) for shard in shards) for name, shards in body["splits"].items()}
    body["lineage"] = tuple(body["lineage"])
    return DatasetManifest(**body)


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
