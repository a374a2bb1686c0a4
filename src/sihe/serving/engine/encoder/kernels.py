"""Row by row between the products of bytes: scale, bias, GELU, norm, and the next product's bytes, in one pass each.

A product of bytes takes less time than reading and writing its result as float32 a few times, which is what single
operations do: these kernels read a row once, while it is in the cache. Each row is computed by the same operations
whatever rows are beside it, so that a text's vector does not depend on the batch.

Bytes are unsigned: a row's lowest number becomes 0 and its highest 255, so that x = low + scale * byte. With the sums
of a product's columns of weights, y = scale * (bytes · w) + low * sum(w) + bias.

Shapes: T tokens, I numbers of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# Rational approximation of erf on [-4, 4], to 4e-7 (Eigen, `generic_fast_erf_float`, and XLA before it:
# https://gitlab.com/libeigen/eigen, unsupported/Eigen/src/SpecialFunctions/SpecialFunctionsImpl.h).
_P = tuple(
    map(
        np.float32,
        (
            -1.60960333262415e-02,
            -2.95459980854025e-03,
            -7.34990630326855e-04,
            -5.69250639462346e-05,
            -2.10102402082508e-06,
            2.77068142495902e-08,
            -2.72614225801306e-10,
        ),
    )
)
_Q = tuple(
    map(
        np.float32,
        (
            -1.42647390514189e-02,
            -7.37332916720468e-03,
            -1.68282697438203e-03,
            -2.13374055278905e-04,
            -1.45660718464996e-05,
        ),
    )
)
_ZERO, _HALF, _ONE, _FOUR, _LARGEST = (np.float32(x) for x in (0, 0.5, 1, 4, 255))
_ROOT_HALF = np.float32(0.7071067811865476)
_LEAST, _NO_SIGN, _SIGN_AT = np.float32(1e-30), np.int32(0x7FFFFFFF), np.int32(31)

_compiled: dict[str, Any] = {"fastmath": True, "nogil": True, "cache": True, "error_model": "numpy"}


@njit(**_compiled)
def _gelu(x):  # type: ignore[no-untyped-def]  # compiled
    z = min(max(x * _ROOT_HALF, -_FOUR), _FOUR)
    s = z * z
    p = _P[6]
    p = p * s + _P[5]
    p = p * s + _P[4]
    p = p * s + _P[3]
    p = p * s + _P[2]
    p = p * s + _P[1]
    p = p * s + _P[0]
    q = _Q[4]
    q = q * s + _Q[3]
    q = q * s + _Q[2]
    q = q * s + _Q[1]
    q = q * s + _Q[0]
    return _HALF * x * (_ONE + z * p / q)


@njit(**_compiled)
def _bytes(x_I, bytes_I):  # type: ignore[no-untyped-def]
    """Writes a row's bytes; its scale and its lowest number, which are no numbers where one of the row's is none.

    Both ends are found among the bits, which compare as the numbers do once those of negative ones are turned over:
    whole numbers are compared many at a time.
    """
    bits_I = x_I.view(np.int32)
    bottom = top = np.int32(bits_I[0] ^ np.int32(np.int32(bits_I[0] >> _SIGN_AT) & _NO_SIGN))
    for i in range(len(x_I)):
        place = np.int32(bits_I[i] ^ np.int32(np.int32(bits_I[i] >> _SIGN_AT) & _NO_SIGN))
        bottom = min(bottom, place)
        top = max(top, place)
    low = np.int32(bottom ^ np.int32(np.int32(bottom >> _SIGN_AT) & _NO_SIGN)).view(np.float32)
    high = np.int32(top ^ np.int32(np.int32(top >> _SIGN_AT) & _NO_SIGN)).view(np.float32)
    scale = (high - low) / _LARGEST + _LEAST
    inverse = _ONE / scale
    for i in range(len(x_I)):
        bytes_I[i] = np.uint8(np.int32((x_I[i] - low) * inverse + _HALF))
    return scale, low


@njit(**_compiled)
def to_bytes(x_TI, factors_I, bytes_TI, scales_T, lows_T):  # type: ignore[no-untyped-def]
    """x * factors as bytes; x is overwritten."""
    for t in range(len(x_TI)):
        x_I = x_TI[t]
        for i in range(len(factors_I)):
            x_I[i] *= factors_I[i]
        scales_T[t], lows_T[t] = _bytes(x_I, bytes_TI[t])


@njit(**_compiled)
def scaled(y_TI, scales_T, lows_T, sums_I, bias_I):  # type: ignore[no-untyped-def]
    """y = y * scale + low * sums + bias, in place."""
    for t in range(len(y_TI)):
        scale, low = scales_T[t], lows_T[t]
        y_I = y_TI[t]
        for i in range(len(bias_I)):
            y_I[i] = y_I[i] * scale + (low * sums_I[i] + bias_I[i])


@njit(**_compiled)
def gelu(y_TI, scales_T, lows_T, sums_I, bias_I):  # type: ignore[no-untyped-def]
    """y = gelu(y * scale + low * sums + bias), in place."""
    for t in range(len(y_TI)):
        scale, low = scales_T[t], lows_T[t]
        y_I = y_TI[t]
        for i in range(len(bias_I)):
            y_I[i] = _gelu(y_I[i] * scale + (low * sums_I[i] + bias_I[i]))


@njit(**_compiled)
def gelu_to_bytes(y_TI, scales_T, lows_T, sums_I, bias_I, factors_I, bytes_TI):  # type: ignore[no-untyped-def]
    """gelu(y * scale + low * sums + bias) * factors as bytes; y is overwritten; scales and lows become the bytes'."""
    for t in range(len(y_TI)):
        scale, low = scales_T[t], lows_T[t]
        y_I = y_TI[t]
        for i in range(len(bias_I)):
            y_I[i] = _gelu(y_I[i] * scale + (low * sums_I[i] + bias_I[i])) * factors_I[i]
        scales_T[t], lows_T[t] = _bytes(y_I, bytes_TI[t])


@njit(**_compiled)
def add_norm_to_bytes(  # type: ignore[no-untyped-def]
    y_TI, scales_T, lows_T, sums_I, bias_I, x_TI, weight_I, shift_I, eps, factors_I, bytes_TI
):
    """x = norm(x + y * scale + low * sums + bias), in place, and x * factors as bytes; y is overwritten."""
    size = np.float32(len(bias_I))
    for t in range(len(y_TI)):
        scale, low = scales_T[t], lows_T[t]
        x_I, y_I = x_TI[t], y_TI[t]
        total = _ZERO
        for i in range(len(bias_I)):
            x_I[i] += y_I[i] * scale + (low * sums_I[i] + bias_I[i])
            total += x_I[i]
        mean = total / size
        squares = _ZERO
        for i in range(len(bias_I)):
            x_I[i] -= mean
            squares += x_I[i] * x_I[i]
        inverse = _ONE / np.sqrt(squares / size + eps)
        for i in range(len(bias_I)):
            x_I[i] = x_I[i] * inverse * weight_I[i] + shift_I[i]
            y_I[i] = x_I[i] * factors_I[i]
        scales_T[t], lows_T[t] = _bytes(y_I, bytes_TI[t])
