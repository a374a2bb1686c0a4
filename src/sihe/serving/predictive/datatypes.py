"""Tensors between the protocol's forms and numpy: JSON values and little-endian bytes.

BF16 has no numpy type and travels as float32 here; BYTES are arrays of `bytes` objects.
Binary form: Triton's binary tensor data extension
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any, cast

import numpy as np

from sihe.core.errors import InvalidInput
from sihe.serving.predictive.types import Array, DataType

_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "BF16": np.float32, "FP32": np.float32, "FP64": np.float64, "BYTES": np.object_,
}  # fmt: skip
_DATATYPE: dict[Any, str] = {np.dtype(kind): name for name, kind in _NUMPY.items() if name != "BF16"}
_MAX_DIMS = 32


def numpy_type(datatype: DataType) -> np.dtype[np.generic]:
    """How numpy holds tensors of `datatype`."""
    return np.dtype(_NUMPY[datatype])


def datatype_of(array: Array) -> DataType:
    """The datatype of an array; text is BYTES. Raises `InvalidInput` for what the protocol does not have."""
    if array.dtype.kind in "US":
        return "BYTES"
    try:
        return cast(DataType, _DATATYPE[array.dtype.newbyteorder("=")])
    except KeyError:
        raise InvalidInput(f"the protocol has no datatype for arrays of {array.dtype}: convert them") from None


def check_shape(shape: Any, name: str) -> tuple[int, ...]:
    """`shape` as a tuple. Raises `InvalidInput`."""
    if not isinstance(shape, list | tuple) or len(shape) > _MAX_DIMS:
        raise InvalidInput(f"tensor {name!r}: shape must be a list of at most {_MAX_DIMS} sizes, got {shape!r:.100}")
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**63:
            raise InvalidInput(f"tensor {name!r}: a size is a whole number from 0 to 2**63 - 1, got {size!r:.100}")
    return tuple(shape)


# ---- binary --------------------------------------------------------------------------------------------------------


def from_binary(data: memoryview, datatype: DataType, shape: tuple[int, ...], name: str) -> Array:
    """The tensor in `data`. It shares memory with numbers. Raises `InvalidInput` when the size is not the shape's."""
    count = prod(shape)
    if datatype == "BYTES":
        return _object_array(_split_bytes(data, count, name), shape, name)
    width = 2 if datatype == "BF16" else numpy_type(datatype).itemsize
    if len(data) != count * width:
        raise InvalidInput(
            f"tensor {name!r}: {datatype} of shape {list(shape)} has {count * width} bytes, got {len(data)}"
        )
    if datatype == "BF16":
        return _shaped((np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32), shape, name)
    if datatype == "BOOL":
        return _shaped(np.frombuffer(data, np.uint8) != 0, shape, name)  # a byte of 2 is no boolean of numpy's
    numbers = np.frombuffer(data, numpy_type(datatype).newbyteorder("<"))
    return _shaped(np.require(numbers, requirements="A"), shape, name)  # the body may put them anywhere


def to_binary(array: Array, datatype: DataType) -> bytes:
    """The bytes of a tensor, in row-major order. BF16 is rounded to nearest, ties to even."""
    if datatype == "BYTES":
        pieces: list[bytes] = []
        for item in array.ravel():
            text = _as_bytes(item)
            pieces += (struct.pack("<I", len(text)), text)
        return b"".join(pieces)
    if datatype == "BF16":
        return _to_bf16(array.astype(np.float32)).astype("<u2").tobytes()
    return np.ascontiguousarray(array, numpy_type(datatype).newbyteorder("<")).tobytes()


def _split_bytes(data: memoryview, count: int, name: str) -> list[bytes]:
    """Elements of a BYTES tensor: each its length in four bytes, then itself."""
    items: list[bytes] = []
    at, end = 0, len(data)
    while at < end:
        stop = at + 4
        if stop <= end:
            stop += int.from_bytes(data[at:stop], "little")
        if stop > end:
            raise InvalidInput(f"tensor {name!r}: element {len(items)} ends after the data: its length is wrong")
        items.append(bytes(data[at + 4 : stop]))
        at = stop
    if len(items) != count:
        raise InvalidInput(f"tensor {name!r}: its shape has {count} elements, and the data {len(items)}")
    return items


def _to_bf16(array: Array) -> Array:
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40  # rounding could carry a NaN over into infinity
    return np.where(np.isnan(array), quiet, rounded).astype(np.uint16)


# ---- JSON ----------------------------------------------------------------------------------------------------------


def from_json(data: Any, datatype: DataType, shape: tuple[int, ...], name: str) -> Array:
    """The tensor of `data`, flat or nested as its shape. Raises `InvalidInput` for values that do not fit."""
    if not isinstance(data, list):
        raise InvalidInput(f"tensor {name!r}: data must be an array, got {type(data).__name__}")
    flat, nested = _flattened(data, name)
    if len(flat) != prod(shape) or (len(nested) > 1 and nested != shape):
        raise InvalidInput(
            f"tensor {name!r}: its shape is {list(shape)}, and the data has {len(flat)} values"
            + (f" nested as {list(nested)}" if len(nested) > 1 else "")
        )
    # numpy makes numbers of text and text of numbers, and the longest text decides how much memory each element gets.
    kinds = set(map(type, flat))
    if datatype == "BYTES":
        return _bytes_from_json(flat, kinds, shape, name)
    return _shaped(_numbers(flat, kinds, datatype, name), shape, name)


def _flattened(data: list[Any], name: str) -> tuple[list[Any], tuple[int, ...]]:
    """The values in their order, and how they were nested."""
    flat, nested = data, [len(data)]
    while flat and type(flat[0]) is list:
        sizes = set(map(len, flat)) if set(map(type, flat)) == {list} else set()
        if len(sizes) != 1 or len(nested) == _MAX_DIMS:
            raise InvalidInput(
                f"tensor {name!r}: its rows have different lengths, or are nested more than {_MAX_DIMS} deep"
            )
        nested.append(sizes.pop())
        flat = list(chain.from_iterable(flat))
    return flat, tuple(nested)


def _numbers(flat: list[Any], kinds: set[type], datatype: DataType, name: str) -> Array:
    target = numpy_type(datatype)
    fits: Mapping[str, tuple[set[type], str]] = {"b": ({bool}, "true or false"), "f": ({int, float}, "numbers")}
    allowed, expected = fits.get(target.kind, ({int}, "whole numbers"))
    if not kinds <= allowed:
        raise InvalidInput(f"tensor {name!r} is {datatype}: its data must be {expected}")
    if target.kind != "f":
        try:
            return np.array(flat, target)
        except OverflowError:
            limits = np.iinfo(cast(Any, target))
            raise InvalidInput(f"tensor {name!r} is {datatype}: values go from {limits.min} to {limits.max}") from None
    with np.errstate(over="ignore"):
        converted = np.array(flat, np.float64).astype(target)
    if not np.isfinite(converted).all():
        raise InvalidInput(f"tensor {name!r} is {datatype}: a value is too large for it")
    return converted


def _bytes_from_json(flat: list[Any], kinds: set[type], shape: tuple[int, ...], name: str) -> Array:
    if not kinds <= {str}:
        raise InvalidInput(f"tensor {name!r} is BYTES: its data must be strings")
    try:
        return _object_array([item.encode() for item in flat], shape, name)
    except UnicodeEncodeError:
        raise InvalidInput(f"tensor {name!r}: a string has half of a surrogate pair: send binary data") from None


def to_json(array: Array, datatype: DataType, name: str) -> list[Any]:
    """The values, flat. Raises `InvalidInput` where JSON cannot carry them."""
    if datatype == "BYTES":
        try:
            return [_as_bytes(item).decode() for item in array.ravel()]
        except UnicodeDecodeError:
            raise InvalidInput(f"output {name!r} is not UTF-8, which JSON needs: ask for it as binary data") from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput(f"output {name!r} holds NaN or infinity, which JSON cannot carry: ask for it as binary data")
    return array.ravel().tolist()


# ---- both ----------------------------------------------------------------------------------------------------------


def as_objects(array: Array) -> Array:
    """Text of any kind as an array of `bytes` objects."""
    return _object_array([_as_bytes(item) for item in array.ravel()], array.shape, "text")


def as_texts(array: Array, name: str) -> Array:
    """A BYTES tensor as an array of `str` objects. Raises `InvalidInput` for what is not UTF-8."""
    texts = np.empty(array.size, dtype=object)
    try:
        texts[:] = [_as_bytes(item).decode() for item in array.ravel()]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"input {name!r} must be UTF-8: {error}") from error
    return cast(Array, texts.reshape(array.shape))


def _as_bytes(item: object) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode()


def _object_array(items: Sequence[bytes], shape: tuple[int, ...], name: str) -> Array:
    array: Array = np.empty(len(items), dtype=object)
    array[:] = items
    return _shaped(array, shape, name)


def _shaped(array: Array, shape: tuple[int, ...], name: str) -> Array:
    try:
        return array.reshape(shape)
    except ValueError as error:  # sizes beside a zero whose product no computer can hold
        raise InvalidInput(f"tensor {name!r}: shape {list(shape)} is impossible: {error}") from None
