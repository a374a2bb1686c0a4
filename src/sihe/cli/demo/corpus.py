"""Stage 1: the standard library of this Python and the handbook, from files to token shards."""

from __future__ import annotations

import sysconfig
from importlib.resources import files
from pathlib import Path

from sihe.cli.demo.journal import Figures
from sihe.cli.demo.stage import Walk

DATASET = "demo"
VOCABULARY = 8192
# Tests and generated tables of the standard library teach a small model little.
EXCLUDE = (
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "pydoc_data",
    "encodings",
)


def handbook() -> Path:
    """The folder of the bilingual handbook that ships with the package."""
    return Path(str(files("sihe.apps.coach"))) / "content" / "handbook"


def prepare(walk: Walk) -> Figures:
    """Fills the lake and publishes the data set."""
    from sihe.data.text.service import TextService
    from sihe.data.text.types import Progress

    def show(progress: Progress) -> None:
        total = f" of {progress.total:,}" if progress.total else ""
        walk.screen.progress(f"{progress.stage}: {progress.done:,}{total} {progress.note}")

    sources = [Path(sysconfig.get_paths()["stdlib"]), handbook()]
    walk.screen.detail(f"input: {sources[0]} and the handbook in two languages")
    prepared = TextService(walk.workspace).prepare(
        DATASET, sources, vocab_size=VOCABULARY, exclude=EXCLUDE, on_progress=show
    )
    walk.screen.detail(", ".join(f"{name} {count:,}" for name, count in prepared.counts.items()))
    return {"folder": str(prepared.folder), "dataset": prepared.key, "counts": dict(prepared.counts)}
