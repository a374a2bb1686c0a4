"""What only the RAG can complain about; the rest comes from `core.errors`.

InvalidInput
├── EmptyQuestion     there is nothing to look for
└── NothingToIndex    none of the paths holds a readable document
CorruptData
└── CorruptIndex      an index on disk is not what was built; building it again mends it
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sihe.apps.rag.types import Skipped
from sihe.core.errors import CorruptData, InvalidInput


class EmptyQuestion(InvalidInput):
    """The question holds no letter or digit."""

    def __init__(self, question: str) -> None:
        super().__init__(f"expected a question with at least one word, got {question!r}")


class NothingToIndex(InvalidInput):
    """None of the paths holds a readable document; `skipped` says why for each. A former index stays as it was."""

    def __init__(self, skipped: Sequence[Skipped]) -> None:
        reasons = "; ".join(f"{item.path}: {item.reason}" for item in skipped[:5])
        more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        super().__init__(f"expected at least one readable text file, got none ({reasons or 'no path'}{more})")
        self.skipped = tuple(skipped)


class CorruptIndex(CorruptData):
    """A version of an index is damaged."""

    def __init__(self, name: str, path: str | Path, reason: str) -> None:
        super().__init__(path, reason, hint=f"build it again with  sihe index build {name} PATHS…")
        self.name = name
