"""The stages behind `TextService.prepare`, with what they count and how long they take."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sihe.core.errors import InvalidInput
from sihe.core.files import exclusive
from sihe.core.workspace import Workspace
from sihe.data.errors import EmptyCorpus
from sihe.data.lake.lake import Lake
from sihe.data.loading.dataset import TokenDataset
from sihe.data.loading.manifest import DatasetManifest, Split
from sihe.data.loading.writer import DatasetWriter, write_dataset
from sihe.data.text.dedupe import NearDuplicates, exact_duplicates, near_verdicts
from sihe.data.text.documents import read_documents
from sihe.data.text.filters import judge
from sihe.data.text.packing import choose_held_out, tokenize
from sihe.data.text.tokenizer import (
    MIN_VOCAB,
    SPECIAL_TOKENS,
    TextEncoder,
    tokenizer_files,
    train_tokenizer,
)
from sihe.data.text.types import Document, PreparedDataset, Progress, Skipped, Verdict

TABLE = "documents"
REPORT_FILE = "documents.parquet"
_RECIPE_VERSION = 1  # raise it when a stage changes what it produces, so that no old result passes for a new one
# 8192 tokens trained on 4 M characters of Python's standard library encode all 12 M of it in 1.9 % more tokens than
# those trained on all of it, after a third of the processor time (measured on two cores).
_TOKENIZER_CHARACTERS = 4_000_000
_TIMEOUT_S = 900.0
_COLUMNS = ("path", "text", "kind", "language", "licence", "sha256")
_REPORT_EVERY = 50  # documents between two calls of on_progress

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Recipe:
    """Every setting that shapes a data set. Raises `InvalidInput` when made."""

    vocab_size: int
    held_out: float
    near_threshold: float
    version: int = _RECIPE_VERSION

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB:
            raise InvalidInput(
                f"vocab_size must hold 256 bytes and {len(SPECIAL_TOKENS)} special tokens, got {self.vocab_size!r}"
            )
        choose_held_out((), self.held_out)
        NearDuplicates(self.near_threshold)


class Preparation:
    """One call of `prepare`."""

    def __init__(self, workspace: Workspace, lake: Lake, name: str, recipe: Recipe, on_progress: OnProgress) -> None:
        self._workspace = workspace
        self._table = lake.table(TABLE)
        self._name = name
        self._recipe = recipe
        self._on_progress = on_progress
        self._seconds: dict[str, float] = {}
        self._skipped: Counter[str] = Counter()

    def run(self, paths: Sequence[Path | str], exclude: Sequence[str], datasets: Path) -> PreparedDataset:
        """Reads the input, and makes the data set unless it is there."""
        with self._stage("read"):
            documents = self._read(paths, exclude)
        snapshot = _digest([[d.path, d.sha256, d.language, d.licence] for d in documents])
        version = _digest({"snapshot": snapshot, **asdict(self._recipe)})[:12]
        folder = datasets / self._name / version
        with exclusive(folder.parent / f".{version}.prepare.lock", timeout_s=_TIMEOUT_S):
            is_reused = folder.exists()
            if not is_reused:
                self._make(documents, snapshot, version, folder)
            manifest = TokenDataset.open(folder).manifest
            self._workspace.tracking.link(manifest.key, manifest.lineage)
        return self._result(manifest, folder, is_reused=is_reused)

    def _make(self, documents: list[Document], snapshot: str, version: str, folder: Path) -> None:
        with self._stage("store"):
            table_version, documents = self._store(documents, snapshot)
        with self._stage("filter"):
            verdicts = self._judge(documents)
        with self._stage("dedupe"):
            self._dedupe([d for d in documents if verdicts[d.path].fate == "kept"], verdicts)
        filtered = Counter(verdict.rule for verdict in verdicts.values() if verdict.fate == "low quality")
        kept = [document for document in documents if verdicts[document.path].fate == "kept"]
        if not kept:
            reasons = ", ".join(f"{count} by {rule!r}" for rule, count in filtered.most_common())
            raise EmptyCorpus(f"the quality rules dropped all of {len(documents)} documents: {reasons}")
        with self._stage("tokenizer"):
            tokenizer = train_tokenizer(_tokenizer_sample(kept), self._recipe.vocab_size)
            encoder = TextEncoder(tokenizer)
        counts = _count(documents, kept, verdicts)
        with (
            self._stage("pack"),
            write_dataset(
                folder,
                name=self._name,
                version=version,
                vocab_size=tokenizer.get_vocab_size(),
                eos_token_id=encoder.eos,
                created_at=self._workspace.clock.now().isoformat(),
                lineage=(f"table:{TABLE}@{table_version}",),
                report={"counts": counts, "filtered": filtered, "skipped": self._skipped},
                settings={"snapshot": snapshot, "table_version": table_version, "recipe": asdict(self._recipe)},
            ) as writer,
        ):
            tokens_of = self._pack(kept, encoder, writer, counts)
            for file, data in tokenizer_files(tokenizer).items():
                writer.add_file(file, data)
            writer.add_file(REPORT_FILE, _report(documents, verdicts, tokens_of))

    # ---- stages -----------------------------------------------------------------------------------------------------

    def _read(self, paths: Sequence[Path | str], exclude: Sequence[str]) -> list[Document]:
        documents = []
        for found in read_documents(paths, exclude=exclude):
            if isinstance(found, Skipped):
                self._skipped[found.reason] += 1
                continue
            documents.append(found)
            self._tell("read", len(documents), None, found.path)
        if not documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self._skipped.most_common()) or "no files"
            raise EmptyCorpus(f"no text to learn from under {', '.join(map(str, paths))}: {reasons}")
        return sorted(documents, key=lambda document: document.path)

    def _store(self, documents: list[Document], snapshot: str) -> tuple[int, list[Document]]:
        """Appends the snapshot once, and reads it back: the data set is made of what the lake holds."""
        columns = {name: [getattr(document, name) for document in documents] for name in _COLUMNS}
        rows = pa.table({"snapshot": [snapshot] * len(documents), **columns})
        version = self._table.append(rows, key=snapshot)
        stored = self._table.read(version, _COLUMNS, where=f"snapshot = '{snapshot}'").to_pylist()
        return version, sorted((Document(**row) for row in stored), key=lambda document: document.path)

    def _judge(self, documents: list[Document]) -> dict[str, Verdict]:
        verdicts = {}
        for document in documents:
            verdicts[document.path] = judge(document)
            self._tell("filter", len(verdicts), len(documents), document.path)
        return verdicts

    def _dedupe(self, documents: list[Document], verdicts: dict[str, Verdict]) -> None:
        repeats = exact_duplicates(document.text for document in documents)
        for repeat, first in repeats.items():
            verdicts[documents[repeat].path] = Verdict("exact duplicate", "sha256", 1.0, documents[first].path)
        distinct = [document for number, document in enumerate(documents) if number not in repeats]
        paths = [document.path for document in distinct]
        found = NearDuplicates(self._recipe.near_threshold).add([document.text for document in distinct])
        verdicts.update(zip(paths, near_verdicts(paths, found), strict=True))

    def _pack(
        self, kept: list[Document], encoder: TextEncoder, writer: DatasetWriter, counts: dict[str, int]
    ) -> dict[str, tuple[Split, int]]:
        held_out = choose_held_out((document.sha256 for document in kept), self._recipe.held_out)
        tokens_of: dict[str, tuple[Split, int]] = {}
        for document, tokens in zip(kept, tokenize(kept, encoder), strict=True):
            split: Split = "held_out" if document.sha256 in held_out else "train"
            writer.append(split, tokens)
            tokens_of[document.path] = (split, tokens.size)
            counts[f"{split}_documents"] += 1
            counts[f"{split}_tokens"] += tokens.size
            self._tell("pack", len(tokens_of), len(kept), document.path)
        return tokens_of

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start_s = self._workspace.clock.monotonic_s()
        self._on_progress(Progress(name, 0, None))
        yield
        self._seconds[name] = self._workspace.clock.monotonic_s() - start_s

    def _tell(self, stage: str, done: int, total: int | None, note: str) -> None:
        if done % _REPORT_EVERY == 0 or done == total:
            self._on_progress(Progress(stage, done, total, note))

    def _result(self, manifest: DatasetManifest, folder: Path, *, is_reused: bool) -> PreparedDataset:
        return PreparedDataset(
            name=self._name,
            version=manifest.version,
            folder=folder,
            table_version=int(manifest.settings["table_version"]),
            counts=manifest.report["counts"],
            skipped=dict(self._skipped),
            filtered=manifest.report["filtered"],
            seconds=self._seconds,
            is_reused=is_reused,
        )


def _count(documents: Sequence[Document], kept: Sequence[Document], verdicts: dict[str, Verdict]) -> dict[str, int]:
    fates = Counter(verdict.fate for verdict in verdicts.values())
    return {
        "documents": len(documents),
        "low_quality": fates["low quality"],
        "exact_duplicates": fates["exact duplicate"],
        "near_duplicates": fates["near duplicate"],
        "kept": len(kept),
        "characters": sum(len(document.text) for document in kept),
        "train_documents": 0,
        "train_tokens": 0,
        "held_out_documents": 0,
        "held_out_tokens": 0,
    }


def _tokenizer_sample(documents: Sequence[Document]) -> list[str]:
    """Texts for the tokenizer: all, or of a large corpus those whose hashes come first, in a fixed order."""
    sample, size = [], 0
    for document in sorted(documents, key=lambda document: document.sha256):
        if size >= _TOKENIZER_CHARACTERS:
            break
        sample.append(document.text)
        size += len(document.text)
    return sample


def _report(
    documents: Sequence[Document], verdicts: dict[str, Verdict], tokens_of: dict[str, tuple[Split, int]]
) -> bytes:
    """One row a document, as Parquet: what became of it and why."""
    rows = []
    for document in documents:
        verdict = verdicts[document.path]
        split, tokens = tokens_of.get(document.path, (None, None))
        rows.append(
            {
                **{name: getattr(document, name) for name in _COLUMNS if name != "text"},
                "fate": verdict.fate,
                "rule": verdict.rule,
                "value": verdict.value,
                "twin": verdict.twin,
                "split": split,
                "tokens": tokens,
            }
        )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, compression="zstd")
    return buffer.getvalue()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
