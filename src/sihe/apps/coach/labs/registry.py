"""Which labs there are. Loads their descriptions, never what they measure with."""

from __future__ import annotations

from sihe.apps.coach.labs.allreduce import ALLREDUCE
from sihe.apps.coach.labs.attention import ATTENTION
from sihe.apps.coach.labs.kvcache import KV_CACHE
from sihe.apps.coach.labs.types import Lab
from sihe.apps.coach.labs.zero import ZERO
from sihe.core.errors import NotFound

LABS: dict[str, Lab] = {lab.id: lab for lab in (ZERO, ALLREDUCE, ATTENTION, KV_CACHE)}
LAB_IDS: tuple[str, ...] = tuple(LABS)


def lab(name: str) -> Lab:
    """One lab. Raises `NotFound`."""
    if name not in LABS:
        raise NotFound("lab", name, hint=f"there are {', '.join(LABS)}")
    return LABS[name]


def labs() -> tuple[Lab, ...]:
    """Every lab."""
    return tuple(LABS.values())
