"""Files and folders as documents. What cannot be read is passed over with its reason; nothing here stops a run.

Links are not followed: a loop cannot catch the walk, and no link can lead out of the folder that was named.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sihe.core.errors import NotFound
from sihe.data.text.languages import classify, natural_language
from sihe.data.text.licences import UNKNOWN, NearestLicence, licence_in
from sihe.data.text.types import Document, Kind, Skipped

EXCLUDED = (".*", "__pycache__", "node_modules", "site-packages", "dist-packages")
MAX_BYTES = 4_000_000  # a larger "text" is nearly always data: the largest of Python's standard library has 0.7 MB


def read_documents(
    paths: Iterable[Path | str], *, exclude: Sequence[str] = (), max_bytes: int = MAX_BYTES
) -> Iterator[Document | Skipped]:
    """Every file under `paths`, in the order of their names: as a `Document`, or as `Skipped` with the reason.

    `exclude` adds patterns to `EXCLUDED`; each is matched against the names of files and folders (`tests`, `*.min.js`)
    and against the path from the root (`docs/*.md`). A file reached by two paths is read once. Raises `NotFound` for a
    path that is not there, before anything is read.
    """
    roots = list(dict.fromkeys(Path(path).resolve() for path in paths))
    for root in roots:
        if not root.exists():
            raise NotFound("file or folder", str(root), hint="give an existing path to read text from")
    patterns = (*EXCLUDED, *exclude)
    seen: set[tuple[int, int]] = set()
    for root, label in zip(roots, _labels(roots), strict=True):
        licences = NearestLicence(root if root.is_dir() else root.parent)
        for file, name in _walk(root, label, patterns):
            if isinstance(file, Skipped):
                yield file
            else:
                yield _read(file, name, licences, seen, max_bytes)


def _labels(roots: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the roots apart: `src`, or `a/src` and `b/src`."""
    labels = []
    for root in roots:
        parts = [part for part in root.parts if part != root.anchor] or ["root"]
        others = [list(other.parts) for other in roots if other != root]
        length = 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        labels.append("/".join(parts[-length:]))
    return labels


def _walk(root: Path, label: str, patterns: Sequence[str]) -> Iterator[tuple[Path | Skipped, str]]:
    if not root.is_dir():
        yield root, label
        return
    folders = [(root, "")]
    while folders:
        folder, inside = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:  # no permission, or gone since it was listed
            yield Skipped(f"{label}/{inside}", "unreadable", error.strerror or ""), ""
            continue
        below = []
        for entry in entries:
            relative = inside + entry.name
            name = f"{label}/{_printable(relative)}"
            if any(fnmatch.fnmatchcase(entry.name, p) or fnmatch.fnmatchcase(relative, p) for p in patterns):
                yield Skipped(name, "excluded"), ""
            elif entry.is_symlink():
                yield Skipped(name, "a link"), ""
            elif entry.is_dir(follow_symlinks=False):
                below.append((Path(entry.path), relative + "/"))
            else:
                yield Path(entry.path), name
        folders += reversed(below)


def _read(
    file: Path, name: str, licences: NearestLicence, seen: set[tuple[int, int]], max_bytes: int
) -> Document | Skipped:
    known = classify(file.name)
    if known is None:
        return Skipped(name, "not a text format", file.suffix.lower())
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return Skipped(name, "not a regular file")
        if status.st_size > max_bytes:
            return Skipped(name, "too large", f"{status.st_size:,} bytes, over {max_bytes:,}")
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            return Skipped(name, "read already")
        data = file.read_bytes()
    except OSError as error:
        return Skipped(name, "unreadable", error.strerror or type(error).__name__)
    seen.add(identity)
    if b"\0" in data:
        return Skipped(name, "binary")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Skipped(name, "not UTF-8", f"byte 0x{data[error.start]:02x} at {error.start:,}")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        return Skipped(name, "empty")
    return _document(name, text, *known, licences.of(file.parent))


def _document(name: str, text: str, kind: Kind, language: str | None, nearest_licence: str) -> Document:
    licence = licence_in(text)
    return Document(
        path=name,
        text=text,
        kind=kind,
        language=language or natural_language(text),
        licence=nearest_licence if licence == UNKNOWN else licence,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def _printable(path: str) -> str:
    """Names that are not UTF-8 reach Python with lone surrogates, which no table can hold."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
