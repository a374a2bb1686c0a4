"""Tensors through JSON and binary and back, and what is refused; binary held against tritonclient's own code."""

from __future__ import annotations

import tracemalloc
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient import utils as triton

from sihe.core.errors import InvalidInput
from sihe.serving.predictive.datatypes import (
    check_shape,
    datatype_of,
    from_binary,
    from_json,
    numpy_type,
    to_binary,
    to_json,
)
from sihe.serving.predictive.types import DATATYPES, Array, DataType

NUMBERS = [cast(DataType, name) for name in DATATYPES if name not in ("BYTES", "BF16")]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


def nested(depth: int) -> Any:
    """A number in so many arrays."""
    data: Any = 1.0
    for _ in range(depth):
        data = [data]
    return data


@given(data=st.data(), datatype=st.sampled_from(NUMBERS), shape=SHAPES)
def test_numbers_survive_binary_and_json(data: st.DataObject, datatype: DataType, shape: tuple[int, ...]) -> None:
    kind = numpy_type(datatype)
    finite = {"allow_nan": False, "allow_infinity": False} if kind.kind == "f" else {}
    array = data.draw(hnp.arrays(kind, shape, elements=hnp.from_dtype(kind, **finite)))  # type: ignore[call-overload]
    assert datatype_of(array) == datatype
    assert triton.np_to_triton_dtype(array.dtype) == datatype
    raw = to_binary(array, datatype)
    assert raw == array.tobytes()
    for again in (
        from_binary(memoryview(raw), datatype, shape, "x"),
        from_json(to_json(array, datatype, "x"), datatype, shape, "x"),
    ):
        assert again.dtype == kind
        np.testing.assert_array_equal(again, array)


@given(hnp.arrays(np.object_, SHAPES, elements=st.binary(max_size=5)))
def test_bytes_are_what_tritonclient_writes_and_reads(array: Array) -> None:
    raw = to_binary(array, "BYTES")
    if array.size:
        assert raw == triton.serialize_byte_tensor(array).item()
        np.testing.assert_array_equal(triton.deserialize_bytes_tensor(raw), array.ravel())
    again = from_binary(memoryview(raw), "BYTES", array.shape, "x")
    np.testing.assert_array_equal(again, array)
    assert again.shape == array.shape


@given(st.lists(st.text(max_size=5), min_size=6, max_size=6))
def test_text_survives_json(texts: list[str]) -> None:
    array = from_json(texts, "BYTES", (2, 3), "x")
    assert array.shape == (2, 3)
    assert to_json(array, "BYTES", "x") == texts


def test_text_comes_nested_too() -> None:
    assert from_json([["a", "b"], ["", "ü"]], "BYTES", (2, 2), "x").tolist() == [[b"a", b"b"], [b"", "ü".encode()]]


@given(hnp.arrays(np.float32, (7,), elements=st.floats(width=32)))
def test_bf16_rounds_as_torch_does(array: Array) -> None:
    expected = torch.from_numpy(array).to(torch.bfloat16).float().numpy()
    raw = to_binary(array, "BF16")
    assert len(raw) == 14
    np.testing.assert_array_equal(from_binary(memoryview(raw), "BF16", (7,), "x"), expected)
    np.testing.assert_array_equal(triton.deserialize_bf16_tensor(raw).ravel(), expected)


def test_an_unaligned_body_gives_an_aligned_tensor() -> None:
    raw = b"x" + np.arange(3, dtype="<f4").tobytes()
    array = from_binary(memoryview(raw)[1:], "FP32", (3,), "x")
    assert array.flags.aligned
    assert array.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "said"),
    [
        ([1, 2], "FP32", (3,), "2 values"),
        ([[1, 2], [3]], "FP32", (3,), "different lengths"),
        ([[1, 2, 3], [4, 5, 6]], "FP32", (3, 2), "nested as"),
        (["a"], "FP32", (1,), "must be numbers"),
        ([None], "FP32", (1,), "must be numbers"),
        ([True], "INT32", (1,), "whole numbers"),
        ([1.5], "INT32", (1,), "whole numbers"),
        ([300], "UINT8", (1,), "from 0 to 255"),
        ([-1], "UINT64", (1,), "from 0 to"),
        ([2**63], "INT64", (1,), "values go from"),
        ([2**70, -1], "INT64", (2,), "values go from"),
        ([1e300], "FP32", (1,), "too large"),
        ([1], "BOOL", (1,), "true or false"),
        ([1], "BYTES", (1,), "must be strings"),
        ([["a"], ["b", "c"]], "BYTES", (3,), "different lengths"),
        ([[1, 2], 3], "FP32", (3,), "different lengths"),
        (["1", 2], "FP32", (2,), "must be numbers"),
        ([1, True], "INT32", (2,), "whole numbers"),
        ([{"a": 1}], "FP32", (1,), "must be numbers"),
        (nested(40), "FP32", (1,), "32 deep"),
        (nested(40), "BYTES", (1,), "32 deep"),
        (["\ud800"], "BYTES", (1,), "surrogate"),
        ("abc", "FP32", (1,), "must be an array"),
        ({"a": 1}, "FP32", (1,), "must be an array"),
        ([], "FP32", (0, 2**62, 2**62), "impossible"),
    ],
)
def test_values_that_do_not_fit_are_refused(data: Any, datatype: DataType, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        from_json(data, datatype, shape, "x")


def test_one_long_text_among_numbers_costs_no_memory_for_each_of_them() -> None:
    data: list[Any] = ["a" * 2**20, *([0] * 2**16)]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match="must be numbers"):
            from_json(data, "FP32", (len(data),), "x")
        assert tracemalloc.get_traced_memory()[1] < 2**26, "an array of text has room for the longest in each element"
    finally:
        tracemalloc.stop()


def test_whole_numbers_beyond_int64_are_exact() -> None:
    assert from_json([2**63 + 1, 0], "UINT64", (2,), "x").tolist() == [2**63 + 1, 0]
    assert from_json([1, 2], "FP64", (2,), "x").tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("raw", "datatype", "said"),
    [
        (b"123", "FP32", "4 bytes, got 3"),
        (b"\x05\0\0\0abc", "BYTES", "its length is wrong"),
        (b"\x05\0", "BYTES", "its length is wrong"),
        (b"\xff\xff\xff\xffab", "BYTES", "its length is wrong"),
        (b"\x01\0\0\0a\x01\0\0\0b", "BYTES", "1 elements, and the data 2"),
    ],
)
def test_bytes_of_a_wrong_length_are_refused(raw: bytes, datatype: DataType, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        from_binary(memoryview(raw), datatype, (1,), "x")


def test_what_json_cannot_carry_is_refused() -> None:
    with pytest.raises(InvalidInput, match="binary"):
        to_json(np.array([np.nan]), "FP64", "x")
    with pytest.raises(InvalidInput, match="binary"):
        to_json(np.array([b"\xff"], dtype=object), "BYTES", "x")


@pytest.mark.parametrize("shape", ["2", None, [1.0], [True], [-1], [2**63], [1] * 33])
def test_bad_shapes_are_refused(shape: Any) -> None:
    with pytest.raises(InvalidInput, match="tensor 'x'"):
        check_shape(shape, "x")
