"""Tensors between the protocol's forms and numpy: JSON values and little-endian bytes.

BF16 has no numpy type and travels as float32 here; BYTES are arrays of `bytes` objects.
Binary form: Triton's binary tensor data extension
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
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
        return _object_array(_split_bytes(data, count, name), shape)
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
    """The tensor of a JSON array, nested as its shape or flat. Raises `InvalidInput` for a value that does not fit."""
    if not isinstance(data, list):
        raise InvalidInput(f"tensor {name!r}: data must be an array, got {type(data).__name__}")
    if datatype == "BYTES":
        return _bytes_from_json(data, shape, name)
    try:
        array = np.array(data) if data else np.array([], numpy_type(datatype))
    except (ValueError, OverflowError):
        raise InvalidInput(f"tensor {name!r}: its rows have different lengths, or a value is no number") from None
    array = _checked_values(array, data, datatype, name)
    _check_count(array, shape, name)
    return _shaped(array, shape, name)


def _checked_values(array: Array, data: Sequence[Any], datatype: DataType, name: str) -> Array:
    kind, target = array.dtype.kind, numpy_type(datatype)
    expected = {"b": "true or false", "f": "numbers"}.get(target.kind, "whole numbers")
    if target.kind in "iu" and kind in "fO" and array.size:
        # Numbers beyond int64 beside negative ones become floats or objects: looked at one by one.
        exact = np.array(data, dtype=object)
        if all(type(value) is int for value in exact.ravel()):
            array, kind = exact, "i"
    fits = {"b": "b", "f": "iuf", "i": "iu", "u": "iu"}[target.kind]
    if array.size and kind not in fits:
        raise InvalidInput(f"tensor {name!r} is {datatype}: its data must be {expected}")
    if target.kind in "iu" and array.size:
        limits = np.iinfo(cast(Any, target))
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise InvalidInput(f"tensor {name!r} is {datatype}: values go from {limits.min} to {limits.max}")
    if target.kind == "f" and array.size:
        with np.errstate(over="ignore"):
            converted = array.astype(target)
        if not np.isfinite(converted).all():
            raise InvalidInput(f"tensor {name!r} is {datatype}: a value is too large for it")
        return converted
    return array.astype(target)


def _bytes_from_json(data: list[Any], shape: tuple[int, ...], name: str) -> Array:
    try:
        flat = list(np.array(data, dtype=object).ravel())
    except ValueError:
        flat = [None]
    if not all(isinstance(item, str) for item in flat):
        raise InvalidInput(f"tensor {name!r} is BYTES: its data must be strings, every row of one length")
    try:
        items = [item.encode() for item in flat]
    except UnicodeEncodeError:
        raise InvalidInput(f"tensor {name!r}: a string has half of a surrogate pair: send binary data") from None
    if len(items) != prod(shape):
        raise InvalidInput(f"tensor {name!r}: its shape has {prod(shape)} elements, and the data {len(items)}")
    return _object_array(items, shape)


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
    return _object_array([_as_bytes(item) for item in array.ravel()], array.shape)


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


def _object_array(items: Sequence[bytes], shape: tuple[int, ...]) -> Array:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return cast(Array, array.reshape(shape))


def _check_count(array: Array, shape: tuple[int, ...], name: str) -> None:
    if array.size != prod(shape) or (array.ndim > 1 and array.shape != shape):
        raise InvalidInput(
            f"tensor {name!r}: its shape is {list(shape)}, and the data has {array.size} values"
            + (f" nested as {list(array.shape)}" if array.ndim > 1 else "")
        )


def _shaped(array: Array, shape: tuple[int, ...], name: str) -> Array:
    try:
        return array.reshape(shape)
    except ValueError as error:  # sizes beside a zero whose product no computer can hold
        raise InvalidInput(f"tensor {name!r}: shape {list(shape)} is impossible: {error}") from None
