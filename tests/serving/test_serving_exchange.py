"""Answers beside each other, against cases worked by hand; and what a record holds of questions and answers."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.serving.engine.encoder.agreement import cosines, same_order
from sihe.serving.engine.encoder.exchange import Encoding, EncodingAnswer
from sihe.serving.engine.encoder.types import EmbeddingRequest, Encoded, RerankRequest
from sihe.serving.exchange import MAX_CHARACTERS, MAX_NUMBERS, apart, fitting, held_bytes
from sihe.serving.predictive.agreement import agreement, equal_share
from sihe.serving.predictive.exchange import Inference, Inferred
from sihe.serving.predictive.types import DataType, InferenceRequest, ModelDescription, TensorSpec

INF, NAN = math.inf, math.nan


# ---- outputs of predictive models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datatype", "a", "b", "share"),
    [
        ("FP64", [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 5.0], 3 / 4),
        ("FP64", [10_000.0], [10_000.9], 1.0),  # within a ten-thousandth
        ("FP64", [10_000.0], [10_001.1], 0.0),
        ("FP32", [1.0, 0.0], [1.0009, 0.000009], 1.0),  # near zero, within a thousandth of a hundredth
        ("FP32", [1.0, 0.0], [1.0011, 0.000011], 0.0),
        ("FP16", [1.0], [1.019], 1.0),
        ("FP64", [NAN, INF, -INF, INF, INF], [NAN, INF, -INF, -INF, 1.0], 3 / 5),
        ("FP64", [NAN], [1.0], 0.0),
        ("INT64", [1, 2, 3], [1, 2, 4], 2 / 3),
        ("INT64", [100_000], [100_001], 0.0),  # whole numbers are labels as often as not
        ("BOOL", [True, False], [True, True], 1 / 2),
        ("BYTES", [b"cat", b"dog"], [b"cat", b"cow"], 1 / 2),
        ("FP64", [1.0, 2.0], [1.0], 0.0),
        ("FP64", [], [], 1.0),
    ],
)
def test_shares_of_equal_outputs(datatype: DataType, a: list[Any], b: list[Any], share: float) -> None:
    kind: Any = object if datatype == "BYTES" else None
    left, right = np.array(a, kind), np.array(b, kind)
    assert equal_share(left, right, datatype) == pytest.approx(share)
    assert equal_share(right, left, datatype) == pytest.approx(share)


def test_text_is_text_in_any_form_and_never_a_number() -> None:
    assert equal_share(np.array(["a", "b"]), np.array([b"a", b"c"], object), "BYTES") == 0.5
    assert equal_share(np.array([b"1"], object), np.array([1]), "BYTES") == 0.0


def test_each_output_weighs_the_same() -> None:
    label, probabilities = np.array([1]), np.full((1, 1000), 0.001)
    datatypes: dict[str, DataType] = {"label": "INT64", "probabilities": "FP64"}
    mine = {"label": label, "probabilities": probabilities}
    assert agreement(mine, {"label": np.array([2]), "probabilities": probabilities}, datatypes) == 0.5
    assert agreement(mine, {"label": label}, datatypes) == 0.5, "what one of them lacks agrees not at all"
    assert agreement(mine, mine, datatypes) == 1.0


# ---- encoders --------------------------------------------------------------------------------------------------------


def rows(*given: list[float]) -> Any:
    return np.array(given, np.float32)


def test_cosines_of_vectors() -> None:
    a = rows([1, 0], [1, 0], [3, 4], [0, 0], [0, 0], [1, 0])
    b = rows([1, 0], [0, 2], [4, 3], [0, 0], [1, 0], [-2, 0])
    found = cosines(a, b)
    assert found is not None
    np.testing.assert_allclose(found, [1, 0, 24 / 25, 1, 0, -1], atol=1e-6)
    assert cosines(a, b[:, :1]) is None


def test_the_order_of_scores() -> None:
    a = np.array([0.9, 0.5, 0.1], np.float32)
    assert same_order(a, np.array([0.8, 0.3, 0.2], np.float32)) == 1.0
    assert same_order(a, a[::-1].copy()) == 0.0
    assert same_order(a, np.array([0.9, 0.1, 0.5], np.float32)) == pytest.approx(2 / 3)
    assert same_order(a, np.full(3, 0.5, np.float32)) == 0.0, "to find all alike is no agreement"
    tied = np.array([0.5, 0.50005, 0.1], np.float32)
    assert same_order(tied, np.array([0.50004, 0.5, 0.1], np.float32)) == 1.0
    assert same_order(a[:1], a[1:2]) == 1.0
    assert same_order(a, a[:2]) == 0.0


@given(st.lists(st.integers(0, 20), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_the_order_is_what_all_pairs_say(scores: list[int], random: Any) -> None:
    others = scores[:]
    random.shuffle(others)
    pairs = [(i, j) for i in range(len(scores)) for j in range(i)]
    same = sum(np.sign(scores[i] - scores[j]) == np.sign(others[i] - others[j]) for i, j in pairs)
    a, b = (np.array(values, np.float32) / 20 for values in (scores, others))
    assert same_order(a, b) == pytest.approx(same / len(pairs))


def vectors(*given: list[float], kind: Any = "embeddings") -> EncodingAnswer:
    return EncodingAnswer(Encoded(rows(*given), 3, "v@1"), kind)


def test_answers_of_encoders_agree_by_their_kind() -> None:
    same = vectors([1, 0], [0, 1]).agreement(vectors([1, 0.001], [0, 2]))
    assert (same.measure, same.is_same, same.share) == ("cosine", True, pytest.approx(1, abs=1e-5))
    half = vectors([1, 0], [0, 1]).agreement(vectors([1, 0], [1, 0]))
    assert (half.share, half.is_same) == (pytest.approx(0.5), False)
    other = vectors([1, 0]).agreement(vectors([1]))
    assert (other.share, other.is_same) == (0.0, False)
    scores = vectors([0.9], [0.1], kind="rerank")
    assert scores.agreement(vectors([0.6], [0.5], kind="rerank")).is_same
    assert scores.agreement(vectors([0.5, 1], [0.6, 1])).share == 0.0
    inferred = Inferred({"y": np.ones(1)}, {"y": "FP64"})
    assert vectors([1, 0]).agreement(inferred).share == inferred.agreement(vectors([1, 0])).share == 0.0


# ---- what a record holds ---------------------------------------------------------------------------------------------


def inference(array: Any, datatype: DataType = "FP64") -> Inference:
    spec = TensorSpec("x", datatype, (-1,) * array.ndim)
    description = ModelDescription("onnx_onnxv1", "m.onnx", (spec,), (TensorSpec("y", "FP64", (-1,)),), batched=False)
    return Inference(InferenceRequest({"x": array}, ("y",)), description, "acme")


def test_tensors_are_written_as_the_protocol_has_them() -> None:
    asked = inference(np.array([[1.5, NAN]]))
    written = asked.written()
    assert json.loads(written.text) == {
        "inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 2], "data": [1.5, None]}]
    }
    assert (asked.kind, asked.tenant, asked.size, written.size) == ("infer", "acme", 16, 16)
    texts = inference(np.array([b"\xff", "ü".encode()], object), "BYTES")
    assert json.loads(texts.written().text)["inputs"][0]["data"] == ["\ufffd", "ü"]
    assert texts.size == 3


def test_of_large_tensors_the_first_values_are_kept_and_all_are_hashed() -> None:
    large = np.zeros((100, 1000))
    other = large.copy()
    other[-1, -1] = 1
    written, changed = inference(large).written(), inference(other).written()
    (kept,) = json.loads(written.text)["inputs"]
    assert (kept["shape"], kept["kept"], len(kept["data"])) == ([100, 1000], MAX_NUMBERS, MAX_NUMBERS)
    assert written.text == changed.text
    assert written.whole != changed.whole
    assert written.size == 800_000
    long = inference(np.array([b"a" * MAX_CHARACTERS, b"b"], object), "BYTES").written()
    assert json.loads(long.text)["inputs"][0] == {
        "name": "x", "datatype": "BYTES", "shape": [2], "data": ["a" * MAX_CHARACTERS], "kept": 1,
    }  # fmt: skip


def test_equal_bytes_in_other_tensors_are_no_equal_text() -> None:
    wholes = {b"".join(inference(array).written().whole) for array in (np.zeros((2, 3)), np.zeros((3, 2)))}
    assert len(wholes) == 2


def test_requests_to_encoders_are_written_up_to_a_bound() -> None:
    few = Encoding(EmbeddingRequest(("you", "half \ud83d", (1, 2)), tenant="acme"))
    assert json.loads(few.written().text) == {"input": ["you", "half \ud83d", [1, 2]]}
    assert (few.kind, few.tenant, few.size) == ("embeddings", "acme", 11)
    many = Encoding(EmbeddingRequest(("a" * 40_000, "b" * 40_000, "c"))).written()
    kept = json.loads(many.text)
    assert ([len(text) for text in kept["input"]], kept["count"]) == ([40_000, MAX_CHARACTERS - 40_000], 3)
    assert many.size > 80_000
    ranked = Encoding(RerankRequest("q", ("d" * MAX_CHARACTERS, "e")))
    kept = json.loads(ranked.written().text)
    assert (kept["query"], len(kept["documents"][0]), kept["count"]) == ("q", MAX_CHARACTERS - 1, 2)
    assert ranked.kind == "rerank"


def test_vectors_are_written_up_to_a_bound() -> None:
    answer = EncodingAnswer(Encoded(np.ones((9, 1000), np.float32), 7, "v@1"), "embeddings")
    kept = json.loads(answer.written().text)
    assert (kept["shape"], len(kept["embeddings"]), len(kept["embeddings"][0])) == ([9, 1000], 4, 1000)
    assert (answer.written().size, answer.size, answer.prompt_tokens) == (36_000, 36_000, 7)
    scores = json.loads(vectors([0.25], [0.5], kind="rerank").written().text)
    assert scores == {"relevance_scores": [0.25, 0.5], "count": 2}


def test_a_row_does_not_keep_its_batch() -> None:
    batch = np.zeros((1000, 10))
    row, large = batch[:1], np.zeros((2, 100_000))[:1]
    assert held_bytes(row) == 80_000
    assert held_bytes(apart(row)) == 80
    assert apart(batch) is batch
    assert apart(large) is large, "a copy of much takes the caller's time"
    assert held_bytes(large) == 1_600_000


@given(st.lists(st.text(max_size=9), max_size=9), st.integers(0, 40))
def test_texts_that_fit_are_the_first_ones(texts: list[str], room: int) -> None:
    kept = fitting(texts, room)
    assert "".join(kept) == "".join(texts)[:room]
    assert kept == [text[: len(kept[place])] for place, text in enumerate(texts[: len(kept)])]
