"""Embeddings and reranking over HTTP, by OpenAI's own client and by plain requests."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from sihe.serving.engine.encoder.engine import EncoderEngine
from sihe.serving.engine.encoder.runner import EncoderRunner
from sihe.serving.engine.encoder.types import EmbeddingRequest, Floats
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import EncodingFailed, WrongCapability
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.traffic.rollout import Gates, Plan, RolloutState, Step
from support.tiny_encoders import tiny_embedder, tiny_reranker

TEXTS = ["the quick fox", "a dog", "pack my box with five dozen jugs"]


@pytest.fixture(scope="module")
def encoders(house: Any, tmp_path_factory: pytest.TempPathFactory) -> Gateway:
    """Two versions of an embedder and a reranker, registered."""
    folder = tmp_path_factory.mktemp("encoders")
    tracking = house.workspace.tracking
    for seed in (0, 1):
        tracking.register_model("vectors", tiny_embedder(folder / f"embedder{seed}", seed=seed))
    tracking.register_model("scores", tiny_reranker(folder / "reranker"))
    gateway: Gateway = house.gateway
    return gateway


@pytest.fixture
def served(encoders: Gateway, gateway: Gateway) -> Gateway:
    """`embed` follows vectors@live, which is version 1 of 2; `rerank` scores; `tiny` generates."""
    gateway.move_alias("vectors", "live", 1)
    for name, target in (("embed", "vectors@live"), ("rerank", "scores")):
        gateway.deploy(name, target)
        gateway.wait_ready(name, timeout_s=60)
    return gateway


@pytest.fixture
def client(served: Gateway, server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def http(served: Gateway, server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=30) as made:
        yield made


def expected(served: Gateway, *texts: str, **more: Any) -> Floats:
    def ask(encoder: Any) -> Floats:
        values: Floats = encoder.submit(EmbeddingRequest(texts, **more)).result(30).values
        return values

    return served.aside("embed").whole(ask)


def test_the_client_gets_vectors_in_both_formats(client: openai.OpenAI, served: Gateway) -> None:
    plain = client.embeddings.create(model="embed", input=TEXTS, encoding_format="float")
    packed = client.embeddings.create(model="embed", input=TEXTS)  # the client asks for base64 and unpacks it
    assert [item.index for item in plain.data] == [0, 1, 2]
    assert np.array([item.embedding for item in plain.data], np.float32).shape == (3, 32)
    for answer in (plain, packed):
        rows = np.array([item.embedding for item in answer.data], np.float32)
        np.testing.assert_allclose(rows, expected(served, *TEXTS), atol=1e-5)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > len(TEXTS)
    assert (plain.object, plain.model) == ("list", "embed")


def test_base64_is_little_endian_float32(http: httpx.Client, served: Gateway) -> None:
    body = {"model": "embed", "input": "the quick fox", "encoding_format": "base64"}
    packed = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(packed), "<f4"), expected(served, "the quick fox")[0], atol=1e-5
    )


def test_inputs_come_as_text_and_as_tokens(client: openai.OpenAI, served: Gateway) -> None:
    one = client.embeddings.create(model="embed", input="a dog").data[0].embedding
    np.testing.assert_allclose(one, expected(served, "a dog")[0], atol=1e-5)
    alone = client.embeddings.create(model="embed", input=[5, 6, 7])
    several = client.embeddings.create(model="embed", input=[[5, 6, 7], [8]])
    assert alone.usage.prompt_tokens == 3
    assert several.usage.prompt_tokens == 4
    np.testing.assert_allclose(several.data[0].embedding, alone.data[0].embedding, atol=1e-5)


def test_dimensions_cut_and_normalise(client: openai.OpenAI, served: Gateway) -> None:
    cut = client.embeddings.create(model="embed", input=TEXTS, dimensions=6)
    rows = np.array([item.embedding for item in cut.data])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(rows, expected(served, *TEXTS, dimensions=6), atol=1e-5)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": ["a dog", "dog " * 100]}, "input", r"input\[1\] has 102 tokens and the model reads 64"),
        ({"input": []}, "input", "input has 1 to 2048 items, got 0"),
        ({"input": ""}, "input", r"input\[0\] is empty"),
        ({"input": [[1], []]}, "input", r"input\[1\] is empty"),
        ({"input": [300]}, "input", "token ids of 0 to 199, got 300"),
        ({"input": [True]}, "input", ""),
        ({"input": 7}, "input", ""),
        ({"input": "a", "dimensions": 0}, "dimensions", "at least 1"),
        ({"input": "a", "dimensions": 64}, "dimensions", "at most 32"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        ({"input": "a", "prompt_name": "query"}, "prompt_name", r"\(none\), got 'query'"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "texts that fit"),
        ({"input": "a\ud800"}, "body", "not valid JSON"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(
    http: httpx.Client, body: dict[str, Any], param: str, message: str
) -> None:
    text = json.dumps({"model": "embed", **body})
    answer = http.post("/v1/embeddings", content=text.encode("utf-8"))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    if error["param"] is not None:
        assert error["param"].split(".")[0] == param
    assert re.search(message, error["message"]), error["message"]


def test_models_are_for_what_they_are_for(client: openai.OpenAI, served: Gateway) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="absent", input="a")
    with pytest.raises(openai.BadRequestError, match="tiny is for generation, and embeddings was asked"):
        client.embeddings.create(model="tiny", input="a")
    with pytest.raises(openai.BadRequestError, match="rerank is for rerank"):
        client.embeddings.create(model="rerank", input="a")
    with pytest.raises(openai.BadRequestError, match="is for embeddings, and generation was asked"):
        client.completions.create(model="embed", prompt="a")
    with pytest.raises(WrongCapability):
        served.generate("embed", GenerationRequest(prompt="a"))
    listed = {model.id: model.capability for model in client.models.list()}  # type: ignore[attr-defined]  # our own field
    assert listed == {"tiny": "generation", "embed": "embeddings", "rerank": "rerank"}


def test_documents_come_back_best_first(http: httpx.Client) -> None:
    body = {"model": "rerank", "query": "quick", "documents": [*TEXTS, {"text": "quick quick"}]}
    whole = http.post("/v1/rerank", json=body).json()
    scores = {item["index"]: item["relevance_score"] for item in whole["results"]}
    assert sorted(scores) == [0, 1, 2, 3]
    assert all(0 <= score <= 1 for score in scores.values())
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert len(set(scores.values())) == 4
    assert "document" not in whole["results"][0]
    best = http.post("/v1/rerank", json={**body, "top_n": 2, "return_documents": True}).json()
    assert [item["index"] for item in best["results"]] == list(scores)[:2]
    texts = [*TEXTS, "quick quick"]
    assert [item["document"]["text"] for item in best["results"]] == [texts[index] for index in list(scores)[:2]]
    assert best["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": "", "documents": ["a"]}, "query is empty"),
        ({"query": "a", "documents": []}, "documents has 1 to 2048"),
        ({"query": "a", "documents": ["a", ""]}, r"documents[1] is empty"),
        ({"query": "a", "documents": ["a", "dog " * 100]}, "documents[1] has"),
        ({"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ({"query": "a", "documents": [{"image": "x"}]}, "documents"),
        ({"query": "a", "documents": ["a"], "max_tokens_per_doc": 0}, "max_tokens_per_doc is at least 1"),
        ({"documents": ["a"]}, "query"),
    ],
)
def test_a_bad_rerank_is_told_what_is_wrong(http: httpx.Client, body: dict[str, Any], message: str) -> None:
    answer = http.post("/v1/rerank", json={"model": "rerank", **body})
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


def test_one_bad_request_disturbs_nobody(http: httpx.Client, client: openai.OpenAI, served: Gateway) -> None:
    right = expected(served, *TEXTS)
    failures: list[object] = []

    def ask(index: int) -> None:
        if index % 3 == 0:
            answer = http.post("/v1/embeddings", json={"model": "embed", "input": ["fox", "dog " * 100]})
            if answer.status_code != 400:
                failures.append(answer.text)
            return
        rows = [item.embedding for item in client.embeddings.create(model="embed", input=TEXTS).data]
        if not np.allclose(rows, right, atol=1e-5):
            failures.append(index)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def test_versions_swap_under_load_and_each_answer_is_of_one(client: openai.OpenAI, served: Gateway) -> None:
    right = {"vectors@1": expected(served, *TEXTS)}
    served.move_alias("vectors", "live", 2)
    served.wait_ready("embed", timeout_s=60)
    right["vectors@2"] = expected(served, *TEXTS)
    assert not np.allclose(right["vectors@1"], right["vectors@2"], atol=1e-2)
    swapped, answers, failures = threading.Event(), [], []

    def ask() -> None:
        while not swapped.is_set():
            try:
                raw = client.embeddings.with_raw_response.create(model="embed", input=TEXTS)
                rows = np.array([item.embedding for item in raw.parse().data])
                answers.append((raw.headers["x-sihe-model-version"], rows))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for move in range(6):
        served.move_alias("vectors", "live", 1 + move % 2)
        served.wait_ready("embed", timeout_s=60)
    swapped.set()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert {version for version, _ in answers} == set(right)
    for version, rows in answers:
        np.testing.assert_allclose(rows, right[version], atol=1e-5)


def test_versions_stand_beside_each_other_and_a_failing_canary_harms_nobody(
    http: httpx.Client, served: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(session: str) -> tuple[str, str]:
        answer = http.post("/v1/embeddings", json={"model": "embed", "input": TEXTS, "user": session})
        assert answer.status_code == 200, answer.text
        rows = np.array([item["embedding"] for item in answer.json()["data"]])
        version = answer.headers["x-sihe-model-version"]
        np.testing.assert_allclose(rows, right[version], atol=1e-5)
        return answer.headers["x-sihe-arm"], version

    def until(holds: Callable[[], bool]) -> None:
        for _ in range(1000):
            served.notify()
            if holds():
                served.notify()
                return
            threading.Event().wait(0.01)
        raise AssertionError("it did not come to hold")

    def has_arm() -> bool:
        return any(arm.name == "canary" and arm.version is not None for arm in served.status("embed").arms)

    right = {"vectors@1": expected(served, *TEXTS)}
    served.move_alias("vectors", "live", 2)
    served.wait_ready("embed", timeout_s=60)
    right["vectors@2"] = expected(served, *TEXTS)
    served.move_alias("vectors", "live", 1)
    served.wait_ready("embed", timeout_s=60)
    gates = Gates(max_latency_ratio=None, max_ttft_ratio=None)
    served.rollouts.start("embed", "vectors@2", Plan(steps=(Step(0.5, 1000, 0),), gates=gates))
    until(has_arm)
    first = {f"s{number}": ask(f"s{number}") for number in range(20)}
    assert set(first.values()) == {("stable", "vectors@1"), ("canary", "vectors@2")}
    assert first == {session: ask(session) for session in first}
    submit = EncoderEngine.submit

    def failing(self: EncoderEngine, request: Any, **more: Any) -> Any:
        job = submit(self, request, **more)
        if self.name == "vectors@2":
            job.fail(EncodingFailed("input", 0, "its weights are wrong"))
        return job

    with monkeypatch.context() as patch:
        patch.setattr(EncoderEngine, "submit", failing)
        for number in range(100):
            assert ask(f"t{number}")[0] == "stable"
            served.notify()
            if "embed" not in served.rollouts.active():
                break
    (rollout, *_) = served.rollouts.history("embed")
    assert rollout.state is RolloutState.ROLLED_BACK
    assert "requests failed" in rollout.reason


def test_a_client_that_leaves_takes_its_texts_along(
    served: Gateway, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, gone = threading.Event(), threading.Event(), threading.Event()
    run, leave = EncoderRunner.encode, EncoderEngine._leave
    computed: list[int] = []

    def held(self: EncoderRunner, documents: Any, skipped: Any) -> Floats:
        begun.set()
        assert go.wait(30)
        computed.append(len(documents))
        return run(self, documents, skipped)

    def watched(self: EncoderEngine, id: int, outcome: Any) -> Any:
        left = leave(self, id, outcome)
        if outcome == "aborted":
            gone.set()
        return left

    def leave_early() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server_url}/v1/embeddings", json=body, timeout=2)

    body = {"model": "embed", "input": ["dog " * 60] * 2000}
    with monkeypatch.context() as patch:
        patch.setattr(EncoderRunner, "encode", held)
        patch.setattr(EncoderEngine, "_leave", watched)
        reader = threading.Thread(target=leave_early)
        reader.start()
        assert begun.wait(30)
        reader.join(30)
        go.set()
        assert gone.wait(30)
    assert sum(computed) < 2000
    assert expected(served, "fox").shape == (1, 32)
