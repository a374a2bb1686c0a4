"""Vectors for Numba kernels: their powers and products of bytes against numpy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import njit

from sihe.core import simd
from sihe.core.simd import BYTE_PRODUCTS, F32X16, I16X32, I32X16, LANES, ByteProduct, Tile, Value, features, tile


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


def product_of(write: Callable[[Tile, Value, Value, Value], Value]) -> Any:
    """A function (int32 [16] sums, bytes [16, 4], bytes [16, 4]) that changes the sums."""

    def emit(t: Tile, given: list[Value]) -> None:
        total, one, other = (t.load(address, I32X16) for address in given)
        t.store(write(t, total, one, other), given[0])

    written = tile(emit, "iii")

    @njit
    def work(totals: Any, ones: Any, others: Any) -> None:
        written(totals.ctypes.data, ones.ctypes.data, others.ctypes.data)

    return work


def dot2(t: Tile, total: Value, one: Value, other: Value) -> Value:
    return t.b.add(total, t.sum_pairs(t.dot2(t.constant(0, I16X32), one, other)))


def extremes(low: int, high: int, kind: Any) -> Any:
    """Bytes [16, 4]: all of them the least, then all of them the largest, then random."""
    numbers = np.random.default_rng(0).integers(low, high + 1, (LANES, 4)).astype(kind)
    numbers[:4], numbers[4:8] = low, high
    return numbers


@pytest.mark.parametrize("way", BYTE_PRODUCTS)
def test_products_of_bytes_are_exact(way: ByteProduct, monkeypatch: pytest.MonkeyPatch) -> None:
    if not BYTE_PRODUCTS[way] <= features():
        pytest.skip(f"the processor has no {way}")
    monkeypatch.setattr(simd, "byte_product", lambda: way)
    signed = extremes(-127, 127, np.int8)
    signed[2:6] = 127
    cases: list[tuple[Callable[..., Value], Any]] = [(Tile.dot4, extremes(0, 15, np.uint8))]
    if way in ("avx2", "sdot"):
        cases += [(Tile.dot4, extremes(0, 127, np.uint8)), (Tile.dot4_signed, extremes(-128, 127, np.int8))]
    if way == "avx2":
        cases += [(dot2, extremes(0, 15, np.uint8))]
    if way not in ("avx2", "sdot"):
        cases += [(Tile.dot4, extremes(0, 255, np.uint8))]
    for write, ones in cases:
        totals = np.arange(LANES, dtype=np.int32)
        expected = totals + (ones.astype(np.int32) * signed).sum(1)
        product_of(write)(totals, ones, signed)
        assert (totals == expected).all()
