"""The encoder's requests: errors that stay with their text, closing, and what observers hear."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from sihe.core.errors import Busy
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.encoder.engine import EncoderEngine
from sihe.serving.engine.encoder.runner import EncoderRunner
from sihe.serving.engine.encoder.tokens import EncoderTokenizer
from sihe.serving.engine.encoder.types import MAX_INPUTS, EmbeddingRequest, Floats, RerankRequest
from sihe.serving.engine.ports import NoObserver, RequestStats, StepStats
from sihe.serving.errors import (
    EncodingFailed,
    EngineClosed,
    EngineDead,
    InputTooLong,
    InvalidRequest,
    QueueFull,
    StreamClosed,
    WrongCapability,
)
from support.encoding import SETTINGS, TEXTS, embed
from support.tiny_encoders import tiny_embedder


def test_a_text_that_is_too_long_is_named(embedder: EncoderEngine) -> None:
    with pytest.raises(InputTooLong, match=r"input\[2\] has 102 tokens and the model reads 64"):
        embed(embedder, "fox", "dog", "dog " * 100)


def test_empty_and_broken_texts_are_named(embedder: EncoderEngine, reranker: EncoderEngine) -> None:
    for texts in ((), ("fox", ""), ("fox",) * (MAX_INPUTS + 1)):
        with pytest.raises(InvalidRequest, match="input"):
            EmbeddingRequest(texts)
    with pytest.raises(InvalidRequest, match=r"input\[1\] is not valid Unicode"):
        embed(embedder, "fox", "\ud800")
    with pytest.raises(InvalidRequest, match="query is not valid Unicode"):
        reranker.submit(RerankRequest("\ud800", ("a",)))
    for query, documents in (("", ("a",)), ("a", ()), ("a", ("",))):
        with pytest.raises(InvalidRequest):
            RerankRequest(query, documents)
    for call in (lambda: EmbeddingRequest(("a",), dimensions=0), lambda: RerankRequest("a", ("b",), 0)):
        with pytest.raises(InvalidRequest, match="at least 1"):
            call()


def test_what_cannot_fit_is_refused_before_it_is_tokenised(
    embedder: EncoderEngine, reranker: EncoderEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    encode = EncoderTokenizer._encode

    def counted(self: EncoderTokenizer, inputs: Any, parameter: str, **more: Any) -> Any:
        asked.append(len(inputs))
        return encode(self, inputs, parameter, **more)

    monkeypatch.setattr(EncoderTokenizer, "_encode", counted)
    long = "a" * (100 * embedder.max_tokens + 1)
    with pytest.raises(InvalidRequest, match=r"input\[1\] has 6401 characters"):
        embed(embedder, "fox", long)
    documents = ("dog",) * 1000
    with pytest.raises(InvalidRequest, match="query has"):
        reranker.submit(RerankRequest(long, documents))
    with pytest.raises(InvalidRequest, match=r"documents\[1\] has"):
        reranker.submit(RerankRequest("fox", ("dog", long)))
    assert asked == [1]
    with pytest.raises(InputTooLong, match="query has"):  # once alone, and not once for each document
        reranker.submit(RerankRequest("dog " * 100, documents))
    assert asked == [1, 1]
    cut = reranker.submit(RerankRequest("fox", ("dog " * 5000,), max_document_tokens=5)).result(30).values
    same = reranker.submit(RerankRequest("fox", ("dog " * 50,), max_document_tokens=5)).result(30).values
    assert np.array_equal(cut, same)


def test_a_model_does_what_it_is_for(embedder: EncoderEngine, reranker: EncoderEngine) -> None:
    with pytest.raises(WrongCapability, match="is for embeddings"):
        embedder.submit(RerankRequest("a", ("b",)))
    with pytest.raises(WrongCapability, match="is for rerank"):
        embed(reranker, "a")


class Held(EncoderRunner):
    """A runner that waits for a sign before its first batch, and fails on a token."""

    POISON = 199

    def __init__(self, runner: EncoderRunner) -> None:
        super().__init__(runner.trunk, runner.tail, runner.recipe)
        self.begun, self.go = threading.Event(), threading.Event()
        self.batches: list[int] = []

    def encode(self, documents: Any, skipped: Any) -> Floats:
        self.begun.set()
        assert self.go.wait(30)
        self.batches.append(len(documents))
        if any(self.POISON in document.tokens for document in documents):
            raise ValueError("poison")
        return super().encode(documents, skipped)


@pytest.fixture
def held(embedder: EncoderEngine, embedder_folder: Path) -> Iterator[tuple[Held, EncoderEngine]]:
    runner = Held(EncoderRunner.load(embedder_folder, SETTINGS))
    engine = EncoderEngine(runner, embedder.tokenizer, EngineConfig(token_budget=40, max_batch_size=4, max_waiting=3))
    yield runner, engine
    runner.go.set()
    engine.close(drain=False)


def test_an_error_stays_with_its_text(held: tuple[Held, EncoderEngine], embedder: EncoderEngine) -> None:
    runner, engine = held
    first = engine.submit(EmbeddingRequest(("the",)))
    assert runner.begun.wait(30)
    bad = engine.submit(EmbeddingRequest(((5, 6), (7, Held.POISON), (8, 9))))
    good = engine.submit(EmbeddingRequest(("fox", "dog")))
    runner.go.set()
    with pytest.raises(EncodingFailed, match=r"input\[1\] could not be encoded: poison"):
        bad.result(30)
    np.testing.assert_allclose(good.result(30).values, embed(embedder, "fox", "dog"), atol=1e-5)
    assert first.result(30).values.shape == (1, 32)
    assert runner.batches[1] == 5, "both were in one batch"
    assert engine.num_sequences == 0


def test_a_closed_request_is_not_computed(held: tuple[Held, EncoderEngine]) -> None:
    runner, engine = held
    done = threading.Event()
    first = engine.submit(EmbeddingRequest(("the",)))
    assert runner.begun.wait(30)
    with engine.submit(EmbeddingRequest(("fox",) * 100), on_done=done.set) as job:
        pass
    runner.go.set()
    assert done.wait(30)
    with pytest.raises(StreamClosed):
        job.result()
    first.result(30)
    assert runner.batches == [1]
    job.close()


def test_too_many_requests_are_told_to_come_back(held: tuple[Held, EncoderEngine]) -> None:
    runner, engine = held
    jobs = [engine.submit(EmbeddingRequest(("the",))) for _ in range(3)]
    with pytest.raises(QueueFull):
        engine.submit(EmbeddingRequest(("the",)))
    with pytest.raises(Busy, match="no answer came"):
        jobs[0].result(0.0)
    runner.go.set()
    assert [len(job.result(30).values) for job in jobs] == [1, 1, 1]


def test_a_drained_engine_finishes_and_an_abandoned_one_says_so(held: tuple[Held, EncoderEngine]) -> None:
    runner, engine = held
    job = engine.submit(EmbeddingRequest(("fox",) * 30))
    assert runner.begun.wait(30)
    closer = threading.Thread(target=engine.close)
    closer.start()
    runner.go.set()
    assert len(job.result(30).values) == 30
    closer.join(30)
    with pytest.raises(EngineClosed):
        engine.submit(EmbeddingRequest(("fox",)))
    assert not engine.is_alive


def test_a_dead_engine_tells_everyone(held: tuple[Held, EncoderEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    runner, engine = held
    job = engine.submit(EmbeddingRequest(("fox",)))
    assert runner.begun.wait(30)

    def broken(stats: StepStats) -> None:
        raise MemoryError("gone")

    monkeypatch.setattr(engine._observer, "on_step", broken)
    later = engine.submit(EmbeddingRequest(("fox",)))
    runner.go.set()
    job.result(30)
    with pytest.raises(EngineDead, match="gone"):
        later.result(30)
    engine.close()
    with pytest.raises(EngineDead, match="gone"):
        engine.submit(EmbeddingRequest(("fox",)))


def test_weights_that_are_no_numbers_fail_the_request(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][150] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with EncoderEngine.load(folder, SETTINGS) as engine:
        bad, good = engine.submit(EmbeddingRequest(((5,), (150,)))), engine.submit(EmbeddingRequest(((5,),)))
        with pytest.raises(EncodingFailed, match=r"input\[1\] .* not finite"):
            bad.result(30)
        assert np.isfinite(good.result(30).values).all()


def test_a_loop_waits_and_its_cancelling_closes(held: tuple[Held, EncoderEngine]) -> None:
    runner, engine = held

    async def run() -> None:
        first = engine.submit(EmbeddingRequest(("the",)))
        second = engine.submit(EmbeddingRequest(("fox",)))
        third = engine.submit(EmbeddingRequest(("dog",)))
        waiting, closed = asyncio.create_task(second.result_async()), asyncio.create_task(third.result_async())
        await asyncio.sleep(0)
        waiting.cancel()
        third.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(StreamClosed):
            await closed
        runner.go.set()
        assert (await first.result_async()).values.shape == (1, 32)

    asyncio.run(run())


def test_observers_hear_of_texts_and_requests(embedder: EncoderEngine, embedder_folder: Path) -> None:
    steps: list[StepStats] = []
    ended: list[RequestStats] = []

    class Watch(NoObserver):
        def on_step(self, stats: StepStats) -> None:
            steps.append(stats)

        def on_request(self, stats: RequestStats) -> None:
            ended.append(stats)

    with EncoderEngine.load(embedder_folder, SETTINGS, observer=Watch()) as engine:
        answer = engine.submit(EmbeddingRequest(tuple(TEXTS))).result(30)
    assert sum(step.prefill_tokens for step in steps) == answer.num_tokens
    assert all(step.prefill_tokens <= 40 for step in steps)
    assert [(stats.outcome, stats.prompt_tokens) for stats in ended] == [("stop", answer.num_tokens)]
