"""Errors that cross a process border. pickle would make them from their message alone, which many classes refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sihe.core.errors import InternalError, SiheError


@dataclass(frozen=True, slots=True)
class Carried:
    """An error as its class and its data."""

    kind: type[BaseException]
    args: tuple[object, ...]
    fields: dict[str, Any]

    @classmethod
    def of(cls, error: BaseException) -> Carried:
        """One of Sihe's as it is; any other as an `InternalError` that names it, as its class may be unknown there."""
        if isinstance(error, SiheError):
            return cls(type(error), error.args, dict(vars(error)))
        return cls(InternalError, (f"{type(error).__name__}: {error}",), {})

    def unpack(self) -> BaseException:
        """The error."""
        error = self.kind.__new__(self.kind, *self.args)
        error.args = self.args
        vars(error).update(self.fields)
        return error
