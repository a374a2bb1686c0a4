"""Random numbers that a seed and a place decide alone, whatever else is computed beside them."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in (0, 1) from a seed and a position: two rounds of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    state = _mix((seed + 0x9E3779B97F4A7C15) & _MASK)
    bits = _mix((state + (position + 1) * 0x9E3779B97F4A7C15) & _MASK)
    return ((bits >> 11) + 0.5) / (1 << 53)


def fork_seed(seed: int, index: int) -> int:
    """The seed of choice number `index` of a request: its own for the first, unrelated ones for the others."""
    return seed if index == 0 else _mix(_mix((seed ^ 0xD1B54A32D192ED03) & _MASK) + index & _MASK)


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
