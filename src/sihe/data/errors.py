"""What can go wrong in the data wing, beyond the errors that every room shares.

InvalidInput
├── DatasetTooSmall     a split holds less than one training sequence
├── EmptyCorpus         no document was left to make a data set of
├── SchemaMismatch      rows do not fit the table's columns
├── SourceEnded         a source of a mixture would be seen more often than it may
├── SourceTooSmall      a source of a mixture has fewer samples than one global batch takes from it
└── TokenizerMismatch   data sets that are mixed were made with different tokenizers
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


class SourceEnded(InvalidInput):
    """The source has given what it may."""

    def __init__(self, source: str, *, needed: float, allowed: float, sample: int) -> None:
        super().__init__(
            f"source {source!r} would be seen {needed:.2f} times by sample {sample:,} and may be {allowed:g} times: "
            "lower its weight, raise its max_epochs, or train for fewer samples"
        )
        self.source = source
        self.needed = needed
        self.allowed = allowed


class SourceTooSmall(InvalidInput):
    """One global batch would hold a sample of the source twice."""

    def __init__(self, source: str, *, samples: int, needed: int) -> None:
        super().__init__(
            f"source {source!r} has {samples:,} samples and one global batch takes {needed:,} of them: "
            "lower its weight, take a smaller batch or shorter sequences, or prepare more text"
        )
        self.source = source
        self.samples = samples
        self.needed = needed


class TokenizerMismatch(InvalidInput):
    """The same token id means different text in two data sets."""

    def __init__(self, dataset: str, other: str) -> None:
        super().__init__(
            f"{dataset} and {other} were made with different tokenizers, so their tokens cannot be mixed: "
            "prepare both with one"
        )
        self.dataset = dataset
        self.other = other
