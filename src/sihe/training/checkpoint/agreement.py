"""What the ranks must agree on while they write or read one checkpoint, over a group of their own.

Gloo matches the messages of a group by their order. The writer runs beside the training's own collectives, so it must
not share a group with them. Nothing here waits longer than the group's time-out, and an error of one rank becomes the
error of all: none of them goes on alone, and none is left waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from sihe.core.errors import CorruptData, NoSpace
from sihe.training.errors import PeerFailed
from sihe.training.ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    """An error on its way to other ranks: plain values, since an exception need not survive pickling."""

    kind: str
    path: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        match error:
            case NoSpace():
                return cls("no space", error.path, "")
            case CorruptData():
                return cls("corrupt", error.path, error.reason)
            case _:
                return cls("other", "", f"{type(error).__name__}: {error}")

    def as_error(self, rank: int) -> Exception:
        match self.kind:
            case "no space":
                return NoSpace(Path(self.path))
            case "corrupt":
                return CorruptData(Path(self.path), self.text)
            case _:
                return PeerFailed(rank, self.text)


class Agreement:
    """The ranks of one run; a single one agrees with itself, without any process group.

    All ranks make it together, and call its methods in the same order. Every method raises `PeerSilent` when a rank
    does not come within `ranks.timeout_s`.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.group: dist.ProcessGroup | None = None
        if ranks.world_size > 1:
            with ranks.errors():
                self.group = cast(
                    dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=ranks.timeout_s))
                )

    @property
    def rank(self) -> int:
        """This process."""
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        """How many have to agree."""
        return self._ranks.world_size

    def waiting(self) -> Any:
        """A context in which a collective of another library on `group` that waits too long raises `PeerSilent`."""
        return self._ranks.errors()

    def everywhere(self, make: Callable[[], T]) -> list[T]:
        """What `make` gives on each rank, by rank. Where it fails on any, every rank raises.

        That is its own error, else that of the first rank that has one: `NoSpace` and `CorruptData` as themselves,
        others as `PeerFailed`.
        """
        try:
            result = make()
        except Exception as error:
            self._gather(_Failure.of(error))
            raise
        results = self._gather(result)
        for rank, other in enumerate(results):
            if isinstance(other, _Failure):
                raise other.as_error(rank)
        return cast(list[T], results)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank, the only one that calls it, on every rank. Raises as `everywhere`."""
        return cast(T, self.everywhere(make if self.rank == 0 else lambda: None)[0])

    def _gather(self, value: object) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._ranks.errors():
            dist.all_gather_object(values, value, group=self.group)
        return values
