"""What a route does next about its replicas. Pure: from what is there and what is wanted to the next moves.

New replicas of a version come up beside the old ones and wait, warm, until there are as many as are wanted: then the
route is flipped in one move and the old ones are drained. Where memory (or the cluster) has no room for that, they are
exchanged: as many old ones leave as new ones are warm, so that no capacity is lost; and where there is no room for
even one more, an old one leaves first, as far as `minimum` allows it. Else nothing is touched, and the refusal stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Stage = Literal["loading", "warm", "ready", "draining", "dead"]


@dataclass(frozen=True, slots=True)
class Member:
    """One replica: whether it is what is wanted (version, settings, backend), how far it is, and its requests."""

    id: int
    is_current: bool
    stage: Stage
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Moves:
    """What to do now. `load` is how many replicas of the wanted version to bring in."""

    load: int = 0
    open: tuple[int, ...] = ()
    drain: tuple[int, ...] = ()
    discard: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.load or self.open or self.drain or self.discard)


def next_moves(
    members: Sequence[Member], *, wanted: int, minimum: int, loads_at_once: int, may_load: bool, has_room: bool
) -> Moves:
    """The moves that lead from `members` towards `wanted` READY replicas of what is wanted.

    `may_load` is false while a version that failed is not to be tried again (yet), `has_room` is false after a load was
    refused for want of memory.
    """
    of = _by_stage(members)
    discard = tuple(member.id for member in of["dead"] + [item for item in of["warm"] if not item.is_current])
    old = [member for member in of["ready"] if not member.is_current]
    serving = [member for member in of["ready"] if member.is_current]
    warm = [member for member in of["warm"] if member.is_current]
    loading = [member for member in of["loading"] if member.is_current]
    moves = Moves(discard=discard)
    if old and len(serving) + len(warm) < wanted:
        if not has_room:
            moves = _exchange(moves, old, serving, warm, wanted=wanted, minimum=minimum, drains=bool(of["draining"]))
    elif warm or old:  # flip
        moves = Moves(0, tuple(item.id for item in warm), tuple(item.id for item in old), discard)
    surplus = len(serving) + len(warm) - wanted
    if surplus > 0:
        leaving = sorted(serving, key=lambda member: (member.in_flight, -member.id))[:surplus]
        moves = Moves(0, moves.open, moves.drain + tuple(item.id for item in leaving), moves.discard)
    missing = wanted - len(serving) - len(warm) - len(loading)
    # Versions whose last streams run on hold memory too: at most two generations of them.
    piled_up = len(of["draining"]) + len(moves.drain) >= 2 * max(1, wanted)
    if may_load and not piled_up and missing > 0:
        return Moves(min(missing, max(0, loads_at_once - len(of["loading"]))), moves.open, moves.drain, moves.discard)
    return moves


def _exchange(
    moves: Moves,
    old: list[Member],
    serving: list[Member],
    warm: list[Member],
    *,
    wanted: int,
    minimum: int,
    drains: bool,
) -> Moves:
    """What a replacement for which there is no room does, while too few of the new replicas are there."""
    leaving = sorted(old, key=lambda member: (member.in_flight, member.id))
    if warm:
        surplus = max(0, len(old) + len(serving) + len(warm) - wanted)
        return Moves(
            open=tuple(item.id for item in warm),
            drain=tuple(item.id for item in leaving[:surplus]),
            discard=moves.discard,
        )
    if not drains and len(old) + len(serving) > max(1, minimum):
        return Moves(drain=(leaving[0].id,), discard=moves.discard)
    return moves


def _by_stage(members: Sequence[Member]) -> dict[Stage, list[Member]]:
    stages: dict[Stage, list[Member]] = {"loading": [], "warm": [], "ready": [], "draining": [], "dead": []}
    for member in members:
        stages[member.stage].append(member)
    return stages
