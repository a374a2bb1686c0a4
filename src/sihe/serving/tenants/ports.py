"""What counts rates: in this process, or for several of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from sihe.serving.tenants.bucket import Rate

Counted = Literal["requests", "tokens"]


@dataclass(frozen=True, slots=True)
class Meter:
    """One bucket, by its name: the same for every process. `amount` is what a request takes from it."""

    name: str
    counts: Counted
    rate: Rate
    amount: float


@dataclass(frozen=True, slots=True)
class Slots:
    """How many requests may run at once under a name."""

    name: str
    limit: int


@dataclass(frozen=True, slots=True)
class Demand:
    """Everything that one request needs, of which it gets all or nothing. What is kept of it is kept by `tenant`."""

    tenant: str
    meters: tuple[Meter, ...] = ()
    slots: tuple[Slots, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a demand was met. `present` is what each meter holds (after taking, if it was), `running` what each of
    the slots' names has. `lease` names what was given."""

    is_granted: bool
    present: tuple[float, ...]
    running: tuple[int, ...]
    lease: str


class RateCounter(Protocol):
    """Counts what tenants take. Thread-safe."""

    def take(self, demand: Demand) -> Decision:
        """Takes everything that is demanded, or nothing."""
        ...

    def settle(self, demand: Demand, lease: str, refunds: dict[str, float]) -> None:
        """Frees the slots of a lease and gives back, by a meter's name, what was taken too much (negative: too
        little). Returns at once."""
        ...

    def close(self) -> None:
        """Ends what runs in the background, after all settlements were made."""
        ...
