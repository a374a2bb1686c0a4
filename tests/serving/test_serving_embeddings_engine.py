"""The encoder: the reference library's numbers, whatever else is in the batch, and errors that stay where they are."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional

from sihe.core.errors import Busy, ConfigError, CorruptData, NotFound, SiheError
from sihe.models.encoder import Encoder
from sihe.models.errors import CheckpointMismatch, UnsupportedModel
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.encoder import kernels
from sihe.serving.engine.encoder.batches import FairQueue, Place
from sihe.serving.engine.encoder.engine import EncoderEngine
from sihe.serving.engine.encoder.quantised import ByteTrunk, is_faster
from sihe.serving.engine.encoder.recipe import read_recipe
from sihe.serving.engine.encoder.runner import EncoderRunner, is_encoder
from sihe.serving.engine.encoder.types import MAX_INPUTS, Document, EmbeddingRequest, Floats, RerankRequest
from sihe.serving.engine.ports import NoObserver, RequestStats, StepStats
from sihe.serving.errors import (
    EncodingFailed,
    EngineClosed,
    EngineDead,
    InputTooLong,
    InvalidRequest,
    NoMemory,
    QueueFull,
    StreamClosed,
    WrongCapability,
)
from support.tiny_encoders import (
    scrambled,
    tiny_decoder_embedder,
    tiny_embedder,
    tiny_reranker,
    word_tokenizer,
    write_modules,
)
from support.tiny_models import tiny_model

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

TEXTS = [
    "the quick fox",
    "a dog",
    "pack my box with five dozen jugs, quick quick quick",
    "zebras",
    "the lazy dog jumps over the lazy dog and the lazy fox",
    "how daft",
]
SETTINGS = EngineConfig(token_budget=40, max_batch_size=4)


def embed(engine: EncoderEngine, *texts: str | tuple[int, ...], **more: Any) -> Floats:
    return engine.submit(EmbeddingRequest(texts, **more)).result(30).values


@pytest.fixture(scope="module")
def embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def embedder(embedder_folder: Path) -> Iterator[EncoderEngine]:
    with EncoderEngine.load(embedder_folder, SETTINGS) as engine:
        yield engine


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncoderEngine]:
    with EncoderEngine.load(tiny_reranker(tmp_path_factory.mktemp("reranker")), SETTINGS) as engine:
        yield engine


# ---- numbers -------------------------------------------------------------------------------------------------------


def reference(folder: Path, texts: list[str], pooling: str) -> torch.Tensor:
    """Vectors as the reference library makes them: text by text, so that nothing is padded."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rows = []
    with torch.no_grad():
        for text in texts:
            x_TD = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
            weight_T1 = torch.arange(1, len(x_TD) + 1)[:, None].float()
            rows.append(
                {
                    "cls": lambda x: x[0],
                    "mean": lambda x: x.mean(0),
                    "max": lambda x: x.amax(0),
                    "mean_sqrt_len": lambda x: x.sum(0) / len(x) ** 0.5,
                    "weightedmean": lambda x, w=weight_T1: (x * w).sum(0) / w.sum(),
                    "lasttoken": lambda x: x[-1],
                }[pooling.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")](x_TD)
            )
    return torch.stack(rows)


@pytest.mark.parametrize(
    "pooling",
    [
        "pooling_mode_cls_token",
        "pooling_mode_mean_tokens",
        "pooling_mode_max_tokens",
        "pooling_mode_mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens",
        "pooling_mode_lasttoken",
    ],
)
def test_pooled_vectors_agree(pooling: str, tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    write_modules(folder, pooling, normalise=False)
    with EncoderEngine.load(folder, SETTINGS) as engine:
        ours = torch.from_numpy(embed(engine, *TEXTS))
    torch.testing.assert_close(ours, reference(folder, TEXTS, pooling), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["RobertaModel", "DistilBertModel", "Qwen3Model"])
def test_other_families_agree(kind: str, tmp_path: Path) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "RobertaModel": {
            "max_position_embeddings": 66,
            "type_vocab_size": 1,
            "intermediate_size": 48,
            "pad_token_id": 0,
        },
        "DistilBertModel": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        "Qwen3Model": {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "intermediate_size": 48,
        },
    }
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} if kind[0] != "D" else {}
    config = getattr(transformers, kind.replace("Model", "Config"))(vocab_size=200, **common, **shapes[kind])
    torch.manual_seed(0)
    scrambled(getattr(transformers, kind)(config), 1).save_pretrained(tmp_path)
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write_modules(tmp_path, "pooling_mode_lasttoken")
    with EncoderEngine.load(tmp_path, SETTINGS) as engine:
        ours = torch.from_numpy(embed(engine, *TEXTS))
    expected = functional.normalize(reference(tmp_path, TEXTS, "pooling_mode_lasttoken"), dim=-1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_window_is_kept(tmp_path: Path) -> None:
    config = transformers.MistralConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        sliding_window=5,
    )
    scrambled(transformers.MistralModel(config), 1).save_pretrained(tmp_path)
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write_modules(tmp_path, "pooling_mode_lasttoken", normalise=False)
    with EncoderEngine.load(tmp_path, SETTINGS) as engine:
        ours = torch.from_numpy(embed(engine, *TEXTS))
    torch.testing.assert_close(ours, reference(tmp_path, TEXTS, "pooling_mode_lasttoken"), rtol=1e-4, atol=1e-5)


def test_dense_layers_agree(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(2, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    sizes = {"in_features": 32, "out_features": 7, "bias": True}
    (folder / "2_Dense/config.json").write_text(json.dumps(sizes))  # Tanh is the library's default
    weights = {"linear.weight": torch.randn(7, 32), "linear.bias": torch.randn(7)}
    save_file(weights, folder / "2_Dense/model.safetensors")
    with EncoderEngine.load(folder, SETTINGS) as engine:
        ours = torch.from_numpy(embed(engine, *TEXTS))
    pooled = reference(folder, TEXTS, "pooling_mode_mean_tokens")
    mapped = torch.tanh(functional.linear(pooled, weights["linear.weight"], weights["linear.bias"]))
    torch.testing.assert_close(ours, functional.normalize(mapped, dim=-1), rtol=1e-4, atol=1e-5)
    save_file({"linear.weight": torch.randn(7, 31)}, folder / "2_Dense/model.safetensors")
    with pytest.raises(CheckpointMismatch):
        EncoderEngine.load(folder, SETTINGS)


def test_scores_agree(reranker: EncoderEngine, tmp_path: Path) -> None:
    folder = tiny_reranker(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ours = reranker.submit(RerankRequest("quick fox", tuple(TEXTS))).result(30)
    assert ours.values.shape == (len(TEXTS), 1)
    for text, score in zip(TEXTS, ours.values[:, 0], strict=True):
        pair = word_tokenizer().encode("quick fox", text)
        with torch.no_grad():
            logit = model(torch.tensor([pair.ids]), token_type_ids=torch.tensor([pair.type_ids])).logits
        assert score == pytest.approx(float(torch.sigmoid(logit)), abs=1e-5)
    assert ours.num_tokens == sum(len(word_tokenizer().encode("quick fox", text).ids) for text in TEXTS)


def test_documents_are_cut_where_that_is_asked_for(reranker: EncoderEngine) -> None:
    def score(*documents: str, limit: int | None = None) -> list[float]:
        return [float(x) for x in reranker.submit(RerankRequest("quick", documents, limit)).result(30).values[:, 0]]

    assert score("the quick fox jumps", "dog", limit=2) == pytest.approx(score("the quick", "dog"), abs=1e-6)
    long = "dog " * 100
    with pytest.raises(InputTooLong, match=r"documents\[1\] has \d+ tokens and the model reads 64"):
        score("dog", long)
    assert score("dog", long, limit=20) == pytest.approx(score("dog", "dog " * 20), abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(TEXTS), st.integers(1, 8)), min_size=1, max_size=12))
def test_alone_and_batched_are_the_same_to_a_hundred_thousandth(
    embedder: EncoderEngine, parts: list[tuple[str, int]]
) -> None:
    texts = tuple(" ".join(text.split()[:words]) for text, words in parts)
    together = embed(embedder, *texts)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_allclose(row, embed(embedder, text)[0], rtol=0, atol=1e-5)


def test_token_lists_are_taken_as_they_are(embedder: EncoderEngine) -> None:
    ids = tuple(word_tokenizer().encode(TEXTS[0]).ids)
    answer = embedder.submit(EmbeddingRequest((ids, TEXTS[0]))).result(30)
    np.testing.assert_allclose(answer.values[0], answer.values[1], atol=1e-6)
    assert answer.num_tokens == 2 * len(ids)
    with pytest.raises(InvalidRequest, match=r"input\[1\] has token ids of 0 to 199, got 200"):
        embed(embedder, ids, (200,))


def test_fewer_dimensions_have_length_one(embedder: EncoderEngine) -> None:
    whole, cut = embed(embedder, *TEXTS), embed(embedder, *TEXTS, dimensions=5)
    expected = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    assert cut.shape == (len(TEXTS), 5)
    with pytest.raises(InvalidRequest, match="dimensions is at most 32"):
        embed(embedder, "fox", dimensions=33)


def test_prompts_stand_before_texts(tmp_path: Path) -> None:
    folder = tiny_decoder_embedder(tmp_path)
    with EncoderEngine.load(folder, SETTINGS) as engine:
        plain = embed(engine, "find: fox")
        np.testing.assert_allclose(embed(engine, "fox", prompt="query"), plain, atol=1e-6)
        np.testing.assert_allclose(embed(engine, "find: fox", prompt="document"), plain, atol=1e-6)
        with pytest.raises(InvalidRequest, match=r"\(document, query\), got 'absent'"):
            embed(engine, "fox", prompt="absent")


def test_a_prompt_can_be_left_out_of_the_pooling(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    write_modules(folder, "pooling_mode_mean_tokens", normalise=False, include_prompt=False)
    texts = {"prompts": {"query": "lazy dog "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(texts))
    with EncoderEngine.load(folder, SETTINGS) as engine:
        ours = embed(engine, "quick fox")[0]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ids = word_tokenizer().encode("lazy dog quick fox").ids
    prompt = len(word_tokenizer().encode("lazy dog ").ids) - 1  # as sentence-transformers counts: less the [SEP]
    with torch.no_grad():
        x_TD = model(torch.tensor([ids])).last_hidden_state[0]
    np.testing.assert_allclose(ours, x_TD[prompt:].mean(0).numpy(), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near(embedder: EncoderEngine, embedder_folder: Path) -> None:
    with EncoderEngine.load(embedder_folder, EngineConfig(dtype="bfloat16")) as engine:
        rough = embed(engine, *TEXTS)
    assert float((rough * embed(embedder, *TEXTS)).sum(1).min()) > 0.999


# ---- who goes first ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.sampled_from("ab")), min_size=1, max_size=8
    ),
    st.integers(1, 60),
    st.sets(st.integers(0, 7)),
)
def test_every_text_is_taken_once_within_the_budget(
    requests: list[tuple[list[int], str]], budget: int, removed: set[int]
) -> None:
    queue = FairQueue()
    for id, (lengths, tenant) in enumerate(requests):
        queue.add(id, lengths, tenant)
    for id in removed:
        queue.remove(id)
    seen: list[Place] = []
    while batch := queue.take(budget):
        lengths = [requests[place.request][0][place.index] for place in batch]
        assert sum(lengths) <= budget or len(batch) == 1
        seen += batch
    kept = [(id, lengths) for id, (lengths, _) in enumerate(requests) if id not in removed]
    assert sorted((place.request, place.index) for place in seen) == [
        (id, index) for id, lengths in kept for index in range(len(lengths))
    ]
    assert (queue.num_tokens, len(queue)) == (0, 0)


def test_a_small_request_does_not_wait_for_a_big_one() -> None:
    queue = FairQueue()
    queue.add(0, [10] * 1000)
    queue.take(100)
    queue.add(1, [10, 10])
    assert queue.take(100).count(Place(1, 0)) == 1
    queue.add(2, [10] * 1000)
    queue.add(3, [10] * 1000)
    queue.add(4, [10] * 6, "other")
    tenants = ["other" if place.request == 4 else "" for place in queue.take(80)]
    assert tenants.count("other") == 4, "a tenant's share does not fall with the requests of another"


# ---- what goes wrong -----------------------------------------------------------------------------------------------


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


# ---- folders -------------------------------------------------------------------------------------------------------


def test_which_folders_are_encoders(tmp_path: Path, embedder_folder: Path) -> None:
    assert is_encoder(embedder_folder)
    assert is_encoder(tiny_reranker(tmp_path / "reranker"))
    assert is_encoder(tiny_decoder_embedder(tmp_path / "decoder"))
    assert not is_encoder(tiny_model(tmp_path / "generator"))


def test_limits_of_the_folder_hold(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 10, "do_lower_case": True}))
    with EncoderEngine.load(folder, SETTINGS) as engine:
        assert engine.max_tokens == 10
        np.testing.assert_allclose(embed(engine, "FOX"), embed(engine, "fox"), atol=1e-6)
    with EncoderEngine.load(folder, EngineConfig(max_context=7)) as engine:
        assert engine.max_tokens == 7


def test_a_plain_folder_is_pooled_by_the_mean(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    (folder / "modules.json").unlink()
    with EncoderEngine.load(folder, SETTINGS) as engine:
        ours = torch.from_numpy(embed(engine, *TEXTS))
    expected = functional.normalize(reference(folder, TEXTS, "pooling_mode_mean_tokens"), dim=-1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_broken_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(name: str, change: Any, error: type[SiheError], match: str) -> None:
        folder = tiny_embedder(tmp_path / name)
        change(folder)
        with pytest.raises(error, match=match):
            EncoderEngine.load(folder, SETTINGS)

    def modules(*kinds: str) -> Any:
        entries = [{"path": "1_Pooling" if kind == "Pooling" else "", "type": f"x.{kind}"} for kind in kinds]
        return lambda folder: (folder / "modules.json").write_text(json.dumps(entries))

    attempt("no pooling", modules("Transformer"), UnsupportedModel, "Pooling")
    attempt("strange", modules("Transformer", "Pooling", "LSTM"), UnsupportedModel, "LSTM")
    attempt("order", modules("Pooling"), UnsupportedModel, "Transformer first")
    attempt("no list", lambda f: (f / "modules.json").write_text("{}"), CorruptData, "list of modules")
    attempt("no json", lambda f: (f / "1_Pooling/config.json").write_text("{"), CorruptData, "JSON")
    attempt("gone", lambda f: (f / "1_Pooling/config.json").unlink(), CorruptData, "cannot be read")
    outside = json.dumps([{"path": "../..", "type": "x.Transformer"}])
    attempt("outside", lambda f: (f / "modules.json").write_text(outside), CorruptData, "outside")
    both = json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True})
    attempt("both", lambda f: (f / "1_Pooling/config.json").write_text(both), UnsupportedModel, "pooling_mode")
    attempt("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), NotFound, "tokenizer")
    attempt("bad tokenizer", lambda f: (f / "tokenizer.json").write_text("{}"), CorruptData, "tokenizer")
    with pytest.raises(ConfigError, match="one label"):
        EncoderEngine.load(tiny_reranker(tmp_path / "labels", labels=3), SETTINGS)
    with pytest.raises(CorruptData, match="two different models"):
        EncoderEngine.load(tiny_embedder(tmp_path / "two", vocab_size=50), SETTINGS)
    monkeypatch.setattr("sihe.serving.engine.encoder.runner.available_bytes", lambda: 1000)
    with pytest.raises(NoMemory):
        EncoderEngine.load(tiny_embedder(tmp_path / "large"), SETTINGS)


def test_newer_names_of_poolings_are_read(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    assert read_recipe(folder).pooling == "last"


def test_segments_of_single_texts_are_the_first(embedder_folder: Path) -> None:
    runner = EncoderRunner.load(embedder_folder, SETTINGS)
    tokens = [5, 6, 7]
    mixed = runner.encode([Document(tokens), Document(tokens, [0, 0, 1])], [0, 0])
    np.testing.assert_allclose(mixed[0], runner.encode([Document(tokens)], [0])[0], atol=1e-6)
    assert not np.allclose(mixed[0], mixed[1], atol=1e-3)


# ---- bytes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_bytes(embedder_folder: Path) -> EncoderRunner:
    """The embedder with its products in bytes, whatever is faster here."""
    runner = EncoderRunner.load(embedder_folder, SETTINGS)
    assert isinstance(runner.trunk, Encoder)
    runner.in_bytes = ByteTrunk(runner.trunk)
    return runner


def documents(*lengths: int) -> list[Document]:
    generator = np.random.default_rng(sum(lengths))
    return [Document(generator.integers(200, size=length).tolist()) for length in lengths]


def test_bytes_give_nearly_the_same_vectors(in_bytes: EncoderRunner, embedder_folder: Path) -> None:
    texts = documents(3, 60, 17, 1, 17, 30)
    exact = EncoderRunner.load(embedder_folder, SETTINGS).encode(texts, [0] * 6)
    assert float((exact * in_bytes.encode(texts, [0] * 6)).sum(1).min()) > 0.995


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=12))
def test_bytes_give_the_same_bits_alone_and_batched(in_bytes: EncoderRunner, lengths: list[int]) -> None:
    texts = documents(*lengths)
    together = in_bytes.encode(texts, [0] * len(texts))
    for text, row in zip(texts, together, strict=True):
        assert np.array_equal(row, in_bytes.encode([text], [0])[0])


def test_kernels_agree_with_torch() -> None:
    generator = np.random.default_rng(0)
    y = generator.normal(scale=3, size=(7, 96)).astype(np.float32)
    y[3] = 0
    scales, lows = np.full(7, 0.5, np.float32), np.full(7, -0.25, np.float32)
    sums, bias, factors = generator.normal(size=(3, 96)).astype(np.float32)
    before = torch.from_numpy(y * 0.5 - 0.25 * sums + bias)
    codes = np.empty(y.shape, np.uint8)

    def read(scales: Floats, lows: Floats) -> torch.Tensor:
        assert (codes.min(1) == 0).all()
        assert (codes.max(1) >= 254).all()
        return torch.from_numpy(codes * scales[:, None] + lows[:, None])

    def near(codes: torch.Tensor, expected: torch.Tensor, scales: Floats) -> None:
        assert ((codes - expected).abs() <= torch.from_numpy(scales)[:, None] * 0.51 + 1e-5).all()

    s, w = scales.copy(), lows.copy()
    kernels.gelu_to_bytes(y.copy(), s, w, sums, bias, factors, codes)
    near(read(s, w), functional.gelu(before) * torch.from_numpy(factors), s)
    s, w, x = scales.copy(), lows.copy(), generator.normal(size=(7, 96)).astype(np.float32)
    weight, shift = generator.normal(size=(2, 96)).astype(np.float32)
    expected = functional.layer_norm(
        torch.from_numpy(x) + before, (96,), torch.from_numpy(weight), torch.from_numpy(shift), 1e-5
    )
    kernels.add_norm_to_bytes(y.copy(), s, w, sums, bias, x, weight, shift, np.float32(1e-5), factors, codes)
    torch.testing.assert_close(torch.from_numpy(x), expected, rtol=1e-4, atol=1e-5)
    near(read(s, w), expected * torch.from_numpy(factors), s)
    plain = y.copy()
    kernels.scaled(plain, scales, lows, sums, bias)
    torch.testing.assert_close(torch.from_numpy(plain), before, rtol=1e-5, atol=1e-5)


def test_what_is_no_number_stays_none_in_bytes(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][150, 3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    runner = EncoderRunner.load(folder, SETTINGS)
    assert isinstance(runner.trunk, Encoder)
    runner.in_bytes = ByteTrunk(runner.trunk)
    rows = runner.encode([Document([5, 6]), Document([5, 150])], [0, 0])
    assert np.isfinite(rows[0]).all()
    assert not np.isfinite(rows[1]).any()


def test_int8_is_taken_where_it_is_faster_and_says_what_it_costs(
    embedder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for faster in (True, False):
        monkeypatch.setattr("sihe.serving.engine.encoder.quantised.is_faster", lambda *_, answer=faster: answer)
        runner = EncoderRunner.load(embedder_folder, EngineConfig(dtype="int8"))
        assert (runner.in_bytes is not None) == faster
        assert runner.encode(documents(5), [0]).shape == (1, 32)
    with pytest.raises(ConfigError, match="int8 is for BERT"):
        EncoderEngine.load(tiny_decoder_embedder(tmp_path), EngineConfig(dtype="int8"))
    with pytest.raises(ConfigError, match="int4 for models that generate"):
        EncoderEngine.load(embedder_folder, EngineConfig(dtype="int4"))


def test_which_is_faster_is_measured(in_bytes: EncoderRunner) -> None:
    assert isinstance(in_bytes.trunk, Encoder)
    assert in_bytes.in_bytes is not None
    assert is_faster(in_bytes.trunk, in_bytes.in_bytes) in (True, False)
