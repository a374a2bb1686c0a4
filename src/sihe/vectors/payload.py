"""Payloads as bytes: what goes in comes out equal, or does not go in at all."""

from __future__ import annotations

import math
from typing import Any

import orjson

from sihe.core.errors import TooLarge
from sihe.vectors.errors import InvalidPayload
from sihe.vectors.types import Payload

MAX_BYTES = 1 << 20
_MAX_DEPTH = 32


def encode(payload: Payload | None, where: str) -> bytes:
    """`payload` as JSON bytes (None is the empty object). Raises `InvalidPayload` or `TooLarge` that name `where`."""
    if payload is None:
        return b"{}"
    if not isinstance(payload, dict):
        raise InvalidPayload(f"{where}: expected a JSON object, got {type(payload).__name__}")
    _check(payload, where, 0)
    try:
        data = orjson.dumps(payload)
    except orjson.JSONEncodeError as error:  # a lone surrogate is all that the check lets through
        raise InvalidPayload(f"{where}: {error}") from error
    if len(data) > MAX_BYTES:
        raise TooLarge(
            f"{where}: a payload holds at most {MAX_BYTES} bytes, got {len(data)}: keep large content outside and "
            "store its address",
            limit=MAX_BYTES,
            actual=len(data),
            unit="bytes",
        )
    return data


def decode(data: bytes) -> dict[str, Any]:
    """The payload that `encode` wrote; a new object each time."""
    value: dict[str, Any] = orjson.loads(data)
    return value


def _check(value: Any, where: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise InvalidPayload(f"{where}: payloads nest at most {_MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InvalidPayload(f"{where}: expected texts as keys, got {key!r}")
            _check(inner, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check(inner, f"{where}[{index}]", depth + 1)
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise InvalidPayload(f"{where}: whole numbers have at most 64 bits, got {value!r}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidPayload(f"{where}: expected a finite number, got {value!r}")
    elif value is not None and not isinstance(value, str):
        raise InvalidPayload(
            f"{where}: expected text, number, boolean, null, list or object, got {type(value).__name__}"
        )
