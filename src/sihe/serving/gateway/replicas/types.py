"""The states of a replica, and what is said of it. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ReplicaState(StrEnum):
    """A replica's life, in order; only READY ones get requests."""

    LOADING = "LOADING"
    WARMING = "WARMING"
    READY = "READY"
    DRAINING = "DRAINING"
    GONE = "GONE"


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One loaded, or loading, version."""

    version: int
    state: ReplicaState
    in_flight: int
