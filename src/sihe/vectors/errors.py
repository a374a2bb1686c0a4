"""What only the vector database can complain about; the rest comes from `core.errors`.

InvalidInput
├── InvalidVector     wrong dimension, not a number, or without a direction
├── InvalidPayload    not a JSON object of plain values
└── InvalidFilter     the filter cannot be read; `where` is the path to the part that is wrong
Busy
└── WriterBusy        another process writes to the collection
"""

from __future__ import annotations

from sihe.core.errors import Busy, InvalidInput


class InvalidVector(InvalidInput):
    """A vector that the collection cannot hold or search for."""


class InvalidPayload(InvalidInput):
    """A payload that cannot be stored and given back unchanged."""


class InvalidFilter(InvalidInput):
    """A filter that cannot be read. `where` leads to the part that is wrong, such as `filter.and[1].range`."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self.where = where


class WriterBusy(Busy):
    """One process writes to a collection at a time, and another one holds the lock of `collection`."""

    def __init__(self, collection: str) -> None:
        super().__init__(
            f"another process is writing to the collection {collection!r} (reading is always possible): "
            "write through that process, or stop it and try again"
        )
        self.collection = collection
