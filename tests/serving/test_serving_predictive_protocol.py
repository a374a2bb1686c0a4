"""Requests and answers of the Open Inference Protocol as bytes: what is read, what is written, what is refused."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core.errors import InvalidInput, TooLarge
from sihe.serving.errors import UnsupportedParameter
from sihe.serving.predictive.bodies import MAX_BODY_BYTES, compressed, decompressed
from sihe.serving.predictive.protocol import OutputForm, build_answer, parse_request
from sihe.serving.predictive.types import ModelDescription, TensorSpec

MODEL = ModelDescription(
    platform="onnx_onnxv1",
    file="model.onnx",
    inputs=(TensorSpec("x", "FP32", (-1, 2)), TensorSpec("text", "BYTES", (-1,))),
    outputs=(TensorSpec("p", "FP32", (-1, 3), ("a", "b", "c")), TensorSpec("name", "BYTES", (-1,))),
)
X: dict[str, Any] = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
TEXT: dict[str, Any] = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["hi"]}


def body(**changes: Any) -> bytes:
    return orjson.dumps({"inputs": [X, TEXT]} | changes)


def test_a_request_in_json() -> None:
    parsed = parse_request(body(id="42", parameters={"timeout": 1500, "priority": 3}), None, MODEL)
    assert parsed.id == "42"
    assert parsed.request.inputs["x"].tolist() == [[1.0, 2.0]]
    assert parsed.request.inputs["text"].tolist() == [b"hi"]
    assert (parsed.request.timeout_s, parsed.request.priority) == (0.0015, 3)
    assert parsed.forms == {"p": OutputForm(), "name": OutputForm()}


def test_tensors_after_the_json() -> None:
    inputs = [
        {"name": "text", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 12}},
        {"name": "x", "shape": [2, 2], "datatype": "FP32", "parameters": {"binary_data_size": 16}},
    ]
    text = orjson.dumps({"inputs": inputs, "outputs": [{"name": "p", "parameters": {"binary_data": True}}]})
    raw = text + b"\x03\0\0\0abc\x01\0\0\0d" + np.arange(4, dtype="<f4").tobytes()
    parsed = parse_request(raw, str(len(text)), MODEL)
    assert parsed.request.inputs["text"].tolist() == [b"abc", b"d"]
    assert parsed.request.inputs["x"].tolist() == [[0, 1], [2, 3]]
    assert parsed.forms == {"p": OutputForm(binary=True)}
    assert parsed.request.outputs == ("p",)


def test_outputs_follow_the_requests_default_and_their_own_word() -> None:
    outputs = [{"name": "name"}, {"name": "p", "parameters": {"binary_data": False, "classification": 2}}]
    parsed = parse_request(body(parameters={"binary_data_output": True}, outputs=outputs), None, MODEL)
    assert parsed.forms == {"name": OutputForm(binary=True), "p": OutputForm(classes=2)}


@pytest.mark.parametrize(
    ("timeout_us", "left_s", "holds_s"),
    [(None, 0.25, 0.25), (1000, 0.25, 0.001), (500_000, 0.25, 0.25), (0, 0.25, 0.25), (0, None, None), (9, None, 9e-6)],
)
def test_of_two_limits_the_shorter_one_holds(
    timeout_us: int | None, left_s: float | None, holds_s: float | None
) -> None:
    given = body(parameters={"timeout": timeout_us})
    assert parse_request(given, None, MODEL, left_s=left_s).request.timeout_s == holds_s


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[1]", "must be a JSON object"),
        (b"[" * 100_000, "no JSON"),
        (b"{}", "inputs must be a list"),
        (body(inputs=[1]), "inputs must be a list"),
        (body(inputs=[X]), "also needs input text"),
        (body(inputs=[X, X, TEXT]), "each once"),
        (body(inputs=[X, TEXT, {"name": "z"}]), "inputs of this model are x, text"),
        (body(inputs=[X, TEXT, {"name": ["x"]}]), "inputs of this model are x, text"),
        (body(inputs=[X | {"datatype": "FP64"}, TEXT]), "is FP32, got 'FP64'"),
        (body(inputs=[X | {"shape": [2]}, TEXT]), "has shape"),
        (body(inputs=[X | {"shape": "1,2"}, TEXT]), "shape must be a list"),
        (body(inputs=[X | {"shape": [1, 3], "data": [1, 2, 3]}, TEXT]), "any size"),
        (body(inputs=[X | {"shape": [2, 2], "data": [1, 2, 3, 4]}, TEXT]), "same number of rows"),
        (
            body(inputs=[X | {"shape": [0, 2], "data": []}, TEXT | {"shape": [0], "data": []}]),
            "at least one",
        ),
        (body(inputs=[X | {"parameters": {"binary_data_size": 8}}, TEXT]), "either data or binary_data_size"),
        (body(inputs=[{k: v for k, v in X.items() if k != "data"}, TEXT]), "either data or binary_data_size"),
        (body(inputs=[X | {"parameters": {"shared_memory_region": "r"}}, TEXT]), "shared_memory_region"),
        (body(parameters=[1]), "must be an object"),
        (body(parameters={"sequence_id": 7}), "sequence_id"),
        (body(parameters={"timeout": "1"}), "microseconds"),
        (body(parameters={"timeout": -1}), "microseconds"),
        (body(parameters={"priority": "high"}), "priority"),
        (body(parameters={"binary_data_output": 1}), "true or false"),
        (body(outputs=[{"name": "q"}]), "has no output 'q'"),
        (body(outputs=[{"name": "p"}, {"name": "p"}]), "each once"),
        (body(outputs=[{"name": "p", "parameters": {"classification": -1}}]), "number of classes"),
        (body(outputs=[{"name": "name", "parameters": {"classification": 1}}]), "only numbers"),
        (body(id=7), "id must be a string"),
    ],
)
def test_what_is_wrong_is_named(raw: bytes, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        parse_request(raw, None, MODEL)


def test_a_parameter_that_would_change_the_answer_is_an_unsupported_one() -> None:
    with pytest.raises(UnsupportedParameter):
        parse_request(body(parameters={"sequence_id": 7}), None, MODEL)
    assert parse_request(body(parameters={"colour": "red"}), None, MODEL).id is None


def test_sizes_that_lie_are_refused() -> None:
    binary = X | {"parameters": {"binary_data_size": 8}}
    del binary["data"]
    text = orjson.dumps({"inputs": [binary, TEXT]})
    good = np.ones(2, dtype="<f4").tobytes()
    assert parse_request(text + good, str(len(text)), MODEL).request.inputs["x"].tolist() == [[1, 1]]
    for raw, length in (
        (text + good, None),
        (text + good, str(len(text) + 1)),
        (text + good, str(len(text) + 1000)),
        (text + good, "-1"),
        (text + good, "²"),
        (text + good + b"x", str(len(text))),
        (text + good[:-1], str(len(text))),
    ):
        with pytest.raises(InvalidInput):
            parse_request(raw, length, MODEL)


@given(st.binary(max_size=60), st.integers(0, 200), st.data())
def test_no_body_breaks_the_parser(noise: bytes, length: int, data: st.DataObject) -> None:
    """Whatever comes is parsed, or refused as input: a body that is spoiled somewhere, with any length."""
    whole = bytearray(body() + b"\x01\0\0\0a")
    at = data.draw(st.integers(0, len(whole)))
    whole[at : at + len(noise)] = noise
    for header in (None, str(length)):
        with contextlib.suppress(InvalidInput):
            parse_request(bytes(whole), header, MODEL)


# ---- answers -------------------------------------------------------------------------------------------------------


OUTPUTS: dict[str, Any] = {
    "p": np.array([[0.5, 0.125, 0.25], [0.0, 1.0, 2.0]], np.float32),
    "name": np.array([b"a", b"c"], dtype=object),
}


def test_an_answer_in_json() -> None:
    parsed = parse_request(body(id="7"), None, MODEL)
    raw, length = build_answer(parsed, OUTPUTS, MODEL, model_name="m", model_version="3")
    assert length is None
    assert orjson.loads(raw) == {
        "model_name": "m",
        "model_version": "3",
        "id": "7",
        "outputs": [
            {"name": "p", "datatype": "FP32", "shape": [2, 3], "data": [0.5, 0.125, 0.25, 0, 1, 2]},
            {"name": "name", "datatype": "BYTES", "shape": [2], "data": ["a", "c"]},
        ],
    }


def test_an_answer_with_bytes_after_it() -> None:
    outputs = [{"name": "name", "parameters": {"binary_data": True}}, {"name": "p"}]
    parsed = parse_request(body(outputs=outputs), None, MODEL)
    raw, length = build_answer(parsed, OUTPUTS, MODEL, model_name="m", model_version="3")
    head = orjson.loads(raw[:length])
    assert "id" not in head
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 10}
    assert "data" not in head["outputs"][0]
    assert raw[length:] == b"\x01\0\0\0a\x01\0\0\0c"


def test_the_best_classes_are_named() -> None:
    outputs = [{"name": "p", "parameters": {"classification": 2}}]
    parsed = parse_request(body(outputs=outputs), None, MODEL)
    raw, _ = build_answer(parsed, OUTPUTS, MODEL, model_name="m", model_version="3")
    assert orjson.loads(raw)["outputs"][0] == {
        "name": "p",
        "datatype": "BYTES",
        "shape": [2, 2],
        "data": ["0.5:0:a", "0.25:2:c", "2.0:2:c", "1.0:1:b"],
    }


# ---- bodies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pack", "unpack"),
    [("gzip", gzip.compress, gzip.decompress), ("deflate", zlib.compress, zlib.decompress)],
)
def test_bodies_are_compressed_as_their_headers_say(name: str, pack: Any, unpack: Any) -> None:
    plain = b"a tensor" * 1000
    assert decompressed(pack(plain), name) == plain
    packed, coding = compressed(plain, name)
    assert (coding, unpack(packed)) == (name, plain)
    assert compressed(plain, f"{name}, br") == (plain, None), "a list is a habit, not a wish"
    assert compressed(b"short", name) == (b"short", None)


@pytest.mark.parametrize(
    "raw",
    [b"", b"not packed", gzip.compress(b"x")[:-4], gzip.compress(b"x") + b"more"],
    ids=["empty", "plain", "cut", "more"],  # a gzip header holds the time: no name for a test
)
def test_spoiled_compression_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidInput):
        decompressed(raw, "gzip")
    with pytest.raises(InvalidInput, match="Content-Encoding"):
        decompressed(raw, "br")


def test_a_bomb_is_stopped_at_the_bound() -> None:
    bomb = gzip.compress(bytes(MAX_BODY_BYTES + 100), 9)
    assert len(bomb) < 100_000
    with pytest.raises(TooLarge) as caught:
        decompressed(bomb, "gzip")
    assert caught.value.actual == MAX_BODY_BYTES + 1
