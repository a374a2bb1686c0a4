"""Vectors for Numba kernels: their powers against numpy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import njit

from sihe.core.simd import F32X16, LANES, Tile, Value, tile


def vectors_of(power: Callable[[Tile, Value], list[Value]]) -> Any:
    """Replaces two registers at an address by their powers."""

    def emit(t: Tile, given: list[Value]) -> None:
        at = [t.at(given[0], 4 * LANES * register) for register in range(2)]
        for value, address in zip(power(t, [t.load(address, F32X16) for address in at]), at, strict=True):
            t.store(value, address)

    written = tile(emit, "i")

    @njit
    def work(numbers: Any) -> None:
        for place in range(0, len(numbers), 2 * LANES):
            written(numbers.ctypes.data + 4 * place)

    return work


POWERS = {
    "exp": (vectors_of(lambda t, xs: [t.exp(x) for x in xs]), np.exp, 87.0),
    "exp2": (vectors_of(lambda t, xs: t.exp2(xs)), np.exp2, 126.0),
}


@pytest.mark.parametrize("name", POWERS)
def test_powers_are_numpys_to_two_in_the_last_place(name: str) -> None:
    power, numpys, lowest = POWERS[name]
    numbers = np.linspace(-lowest, 0, 1 << 16, dtype=np.float32)
    exact = numpys(numbers.astype(np.float64))
    power(numbers)
    assert (np.abs(numbers - exact) / np.spacing(exact.astype(np.float32))).max() <= 2


@pytest.mark.parametrize("name", POWERS)
def test_powers_of_what_is_too_small_are_nearly_nothing_and_of_what_is_no_number_none(name: str) -> None:
    power, _, lowest = POWERS[name]
    numbers = np.full(2 * LANES, -np.inf, np.float32)
    numbers[1], numbers[2], numbers[LANES], numbers[LANES + 1] = -3e38, np.nan, 0.0, -lowest - 1
    power(numbers)
    assert np.isnan(numbers[2])
    assert numbers[LANES] == 1
    rest = np.delete(numbers, [2, LANES])
    assert ((rest >= 0) & (rest < 2e-38)).all()
