"""Values that pass between the stages of the text path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["code", "prose"]
Fate = Literal["kept", "low quality", "exact duplicate", "near duplicate"]
STAGES = ("read", "store", "filter", "dedupe", "tokenizer", "pack")


@dataclass(frozen=True, slots=True)
class Document:
    """One readable text file.

    `path` is relative to the folder it was found in and begins with that folder's name, so it does not depend on the
    machine. `sha256` is that of the text in UTF-8.
    """

    path: str
    text: str
    kind: Kind
    language: str  # "python", …; of prose: "en", "zh" or "other"
    licence: str  # an SPDX identifier, or "unknown"
    sha256: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder that was not read, and why. `reason` is one of few, `detail` tells the case."""

    path: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a document: by which rule, at which measured value; of a duplicate, which document it repeats."""

    fate: Fate
    rule: str = ""
    value: float | None = None
    twin: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage has come; `total` is None where it is not known beforehand."""

    stage: str
    done: int
    total: int | None
    note: str = ""


@dataclass(frozen=True)
class PreparedDataset:
    """A token data set that is ready for training, and what went into it.

    `counts` tells documents and tokens after each stage, `skipped` and `filtered` the reasons, `seconds` what each
    stage of this call took. `is_reused` says that the same input had been prepared before.
    """

    name: str
    version: str
    folder: Path
    table_version: int
    counts: Mapping[str, int]
    skipped: Mapping[str, int]
    filtered: Mapping[str, int]
    seconds: Mapping[str, float]
    is_reused: bool

    @property
    def key(self) -> str:
        """How lineage and pages name it: `dataset:stdlib@3f2a…`."""
        return f"dataset:{self.name}@{self.version}"
