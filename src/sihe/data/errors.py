"""What can go wrong in the data wing, beyond the errors that every room shares.

InvalidInput
├── DatasetTooSmall     a split holds less than one training sequence
├── EmptyCorpus         no document was left to make a data set of
└── SchemaMismatch      rows do not fit the table's columns
"""

from __future__ import annotations

from pathlib import Path

from sihe.core.errors import InvalidInput


class DatasetTooSmall(InvalidInput):
    """The split ends before one sequence is complete."""

    def __init__(self, folder: Path, split: str, *, tokens: int, needed: int) -> None:
        super().__init__(
            f"split {split!r} of {folder} has {tokens:,} tokens and one sequence with its targets needs {needed:,}: "
            "shorten the sequences or prepare more text"
        )
        self.split = split
        self.tokens = tokens
        self.needed = needed


class EmptyCorpus(InvalidInput):
    """Nothing is left of the input; the message says where it went."""


class SchemaMismatch(InvalidInput):
    """The rows given do not have the columns of the table."""

    def __init__(self, table: str, reason: str) -> None:
        super().__init__(f"rows do not fit table {table!r}: {reason}")
        self.table = table
