"""The engine: the same tokens alone and in a batch, and nobody's trouble is anybody else's."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from sihe.core.errors import ConfigError, CorruptData, InvalidInput, NotFound
from sihe.models.errors import CheckpointMismatch
from sihe.serving.engine.answer import Answer
from sihe.serving.engine.compute.step import Feed
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.kv.blocks import BLOCK_TOKENS
from sihe.serving.engine.kv.storage import bytes_per_block
from sihe.serving.engine.runner import ModelRunner
from sihe.serving.engine.types import ChatMessage, Generation, GenerationRequest
from sihe.serving.errors import ContextTooLong, EngineClosed, EngineDead, GenerationFailed, NoMemory, StreamClosed
from support.tiny_models import tiny_config, tiny_model


def requests(count: int, seed: int) -> list[GenerationRequest]:
    """Prompts and answers of many lengths, greedy and seeded."""
    source = random.Random(seed)
    return [
        GenerationRequest(
            prompt=tuple(source.randrange(5, 300) for _ in range(source.choice([1, 2, 7, 31, 32, 33, 70]))),
            max_tokens=source.randrange(1, 40),
            temperature=source.choice([0.0, 0.0, 0.9]),
            top_p=source.choice([1.0, 0.8]),
            seed=source.randrange(1000),
        )
        for _ in range(count)
    ]


def run_alone(folder: Path, asked: Sequence[GenerationRequest]) -> list[Generation]:
    """Each request by itself, its prompt in one chunk."""
    with Engine.load(folder, EngineConfig(max_batch_size=1, token_budget=512)) as engine:
        return [engine.submit(request).result(30) for request in asked]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, kv_heads: int) -> None:
    folder = tiny_model(tmp_path / "model", seed=kv_heads, config=tiny_config(num_kv_heads=kv_heads, eos=False))
    reference = LlamaForCausalLM.from_pretrained(folder).eval()
    source = random.Random(kv_heads)
    with Engine.load(folder, EngineConfig(max_batch_size=4, token_budget=16)) as engine:
        prompts = [tuple(source.randrange(5, 300) for _ in range(size)) for size in (1, 5, 16, 40)]
        streams = [engine.submit(GenerationRequest(prompt=prompt, max_tokens=24, temperature=0)) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            ids = torch.tensor([prompt])
            whole = reference.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
            assert list(stream.result(30).token_ids) == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("batch", "budget"), [(3, 5), (8, 32), (8, 512)])
def test_tokens_are_the_same_alone_and_in_a_batch(model_folder: Path, batch: int, budget: int) -> None:
    asked = requests(16, seed=batch * budget)
    alone = run_alone(model_folder, asked)
    with Engine.load(model_folder, EngineConfig(max_batch_size=batch, token_budget=budget)) as engine:
        streams = [engine.submit(request) for request in asked]  # they join and leave as slots come free
        assert said([stream.result(30) for stream in streams]) == said(alone)


def test_requests_that_join_and_leave_half_way_change_nobody(model_folder: Path) -> None:
    asked = requests(20, seed=3)
    alone = run_alone(model_folder, asked)
    source = random.Random(4)
    with Engine.load(model_folder, EngineConfig(max_batch_size=4, token_budget=12)) as engine:
        streams = []
        for request in asked:
            streams.append(engine.submit(request))
            if source.random() < 0.5:  # let some steps pass: until an earlier one has said something, or ended
                source.choice(streams).next_event(30)
            if source.random() < 0.3:
                source.choice(streams).close()
        for stream, expected in zip(streams, alone, strict=True):
            try:
                events = list(stream)
            except StreamClosed:
                continue
            if events and events[-1].finish_reason is not None:
                tail = [token for event in events for token in event.token_ids]
                assert list(expected.token_ids[-len(tail) :]) == tail
        engine.close()
    assert engine._pool.num_used == 0


def test_a_thousand_aborts_leave_nothing_behind(model_folder: Path) -> None:
    source = random.Random(9)
    with Engine.load(model_folder, EngineConfig(max_batch_size=6, token_budget=24, max_waiting=2000)) as engine:
        open_streams = []
        for _ in range(1000):
            size = source.randrange(1, 60)
            open_streams.append(engine.submit(GenerationRequest(prompt=(7,) * size, max_tokens=30)))
            if len(open_streams) > 8:
                open_streams.pop(source.randrange(len(open_streams))).close()
        for stream in open_streams:
            stream.close()
        after = engine.submit(GenerationRequest(prompt=(7,), max_tokens=3, temperature=0)).result(30)
        engine.close()
        assert (engine._pool.num_used, engine.num_sequences) == (0, 0)
    assert after == run_alone(model_folder, [GenerationRequest(prompt=(7,), max_tokens=3, temperature=0)])[0]


def said(answers: Sequence[Generation]) -> list[Generation]:
    """The answers without what the cache has saved, which depends on what else ran."""
    return [replace(answer, usage=replace(answer.usage, cached_tokens=0)) for answer in answers]


def test_streams_on_an_event_loop(engine: Engine) -> None:
    asked = requests(12, seed=5)

    async def read(request: GenerationRequest) -> Generation:
        return await engine.submit(request).result_async()

    async def read_all() -> list[Generation]:
        return await asyncio.gather(*(read(request) for request in asked))

    assert said(asyncio.run(read_all())) == said([engine.submit(request).result(30) for request in asked])


def test_prefixes_are_found_again_within_their_scope(engine: Engine) -> None:
    def cached(prompt: tuple[int, ...], **fields: str) -> int:
        request = GenerationRequest(prompt=prompt, max_tokens=2, temperature=0, **fields)  # type: ignore[arg-type]
        return engine.submit(request).result(30).usage.cached_tokens

    prompt = tuple(range(5, 45))
    assert [cached(prompt), cached(prompt), cached((*prompt[:20], 7))] == [0, 32, 16]
    assert cached(prompt[:32]) == 16  # the block of the last token is computed: its output is wanted
    assert [cached(prompt, cache_salt="a"), cached(prompt, cache_salt="a"), cached(prompt, cache_salt="b")] == [
        0,
        32,
        0,
    ]
    engine.forget_prefixes()
    assert [cached(prompt), cached(prompt)] == [0, 32]


def test_stop_reasons(tmp_path: Path, engine: Engine) -> None:
    whole = engine.submit(GenerationRequest(prompt=(9,), max_tokens=30, temperature=0)).result(30)
    stop = whole.text[10:12]
    cut = engine.submit(GenerationRequest(prompt=(9,), max_tokens=30, temperature=0, stop=("absent", stop))).result(30)
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert cut.usage.completion_tokens < 30
    # One of the greedy tokens, declared the end of a sequence, ends the answer and shows no text.
    end = whole.token_ids[1]
    until = whole.token_ids.index(end) + 1
    folder = tiny_model(tmp_path / "eos", config=tiny_config(eos=False))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, end]}))
    with Engine.load(folder) as ending:
        request = GenerationRequest(prompt=(9,), max_tokens=30, temperature=0)
        ended = ending.submit(request).result(30)
        assert (ended.token_ids, ended.finish_reason) == (whole.token_ids[:until], "stop")
        assert whole.text.startswith(ended.text)
        on = ending.submit(GenerationRequest(prompt=(9,), max_tokens=30, temperature=0, ignore_eos=True)).result(30)
        assert said([on]) == said([whole])


def test_the_context_bounds_prompt_and_answer(engine: Engine) -> None:
    full = engine.submit(GenerationRequest(prompt=(5,) * 120, max_tokens=50, temperature=0)).result(30)
    assert (full.usage.completion_tokens, full.finish_reason) == (8, "length")
    assert engine.submit(GenerationRequest(prompt=(5,) * 127, temperature=0)).result(30).usage.completion_tokens == 1
    with pytest.raises(ContextTooLong) as caught:
        engine.submit(GenerationRequest(prompt=(5,) * 128))
    assert (caught.value.limit, caught.value.actual) == (128, 128)


def test_wrong_inputs_are_refused_before_they_reach_the_batch(engine: Engine) -> None:
    for bad in ((320,), (-1,)):
        with pytest.raises(InvalidInput, match="0 to 319"):
            engine.submit(GenerationRequest(prompt=bad))
    with pytest.raises(InvalidInput, match="unknown role"):
        engine.submit(GenerationRequest(messages=(ChatMessage("robot", "x"),)))
    with pytest.raises(InvalidInput, match="Unicode"):
        engine.submit(GenerationRequest(prompt="\ud800"))
    for fields in (
        {},
        {"prompt": "x", "messages": (ChatMessage("user", "x"),)},
        {"prompt": "x", "top_p": float("nan")},
    ):
        with pytest.raises(InvalidInput):
            GenerationRequest(**fields)  # type: ignore[arg-type]


def test_one_request_that_fails_harms_no_other(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(6, seed=8)
    alone = run_alone(model_folder, asked)
    forward = ModelRunner.forward
    poison = 299

    def failing_step(self: ModelRunner, feeds: Sequence[Feed]) -> Tensor:
        if any(poison in item.tokens for item in feeds):
            raise RuntimeError("poisoned")
        return forward(self, feeds)

    monkeypatch.setattr(ModelRunner, "forward", failing_step)
    with Engine.load(model_folder, EngineConfig(max_batch_size=8, token_budget=16)) as engine:
        streams = [engine.submit(request) for request in asked[:3]]
        bad = engine.submit(GenerationRequest(prompt=(5,) * 20 + (poison,)))
        streams += [engine.submit(request) for request in asked[3:]]
        with pytest.raises(GenerationFailed, match="poisoned"):
            bad.result(30)
        for stream, expected, request in zip(streams, alone, asked, strict=True):
            if poison not in (*expected.token_ids, *(request.prompt or ())):
                assert said([stream.result(30)]) == said([expected])
        assert engine.is_alive


@pytest.mark.parametrize("method", ["draws", "read"])
def test_an_answer_that_cannot_go_on_harms_no_other(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    asked = GenerationRequest(prompt=(5, 6), max_tokens=6, temperature=0)
    expected = engine.submit(asked).result(30)
    plain = getattr(Answer, method)

    def failing(self: Answer, *arguments: object) -> object:
        if self.request.seed == 13 and self.count == 2:
            raise RuntimeError("out of ink")
        return plain(self, *arguments)

    monkeypatch.setattr(Answer, method, failing)
    good = [engine.submit(asked), engine.submit(asked)]
    with pytest.raises(GenerationFailed, match="out of ink"):
        engine.submit(replace(asked, seed=13)).result(30)
    assert said([stream.result(30) for stream in good]) == said([expected] * 2)
    assert engine._pool.num_used == 0


def test_weights_that_are_not_numbers_are_an_error_not_an_answer(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with Engine.load(folder) as engine, pytest.raises(GenerationFailed, match="NaN"):
        engine.submit(GenerationRequest(prompt=(5,))).result(30)


def test_a_dead_engine_tells_its_readers_and_its_callers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = engine.submit(GenerationRequest(prompt=(5,), max_tokens=100))
    stream.next_event(30)

    def broken(*_: object) -> None:
        raise MemoryError("the scheduler is gone")

    monkeypatch.setattr(engine._scheduler, "plan", broken)
    with pytest.raises(EngineDead, match="the scheduler is gone"):
        list(stream)
    with pytest.raises(EngineDead):
        engine.submit(GenerationRequest(prompt=(5,)))
    assert not engine.is_alive
    engine.close()


def test_close_drains_or_ends_what_runs(model_folder: Path) -> None:
    engine = Engine.load(model_folder)
    streams = [engine.submit(GenerationRequest(prompt=(5,), max_tokens=20)) for _ in range(5)]
    engine.close(drain=True)
    assert [stream.result(30).usage.completion_tokens for stream in streams] == [20] * 5
    with pytest.raises(EngineClosed):
        engine.submit(GenerationRequest(prompt=(5,)))
    engine = Engine.load(model_folder)
    stream = engine.submit(GenerationRequest(prompt=(5,) * 10))
    engine.close(drain=False)
    with pytest.raises(EngineClosed):
        stream.result(30)


def test_a_reader_that_waits_sees_a_close_from_elsewhere(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held, go = threading.Event(), threading.Event()
    forward = ModelRunner.forward

    def held_step(self: ModelRunner, feeds: Sequence[Feed]) -> Tensor:
        held.set()
        assert go.wait(30)
        return forward(self, feeds)

    monkeypatch.setattr(ModelRunner, "forward", held_step)
    stream = engine.submit(GenerationRequest(prompt=(5,)))
    assert held.wait(30)
    closer = threading.Timer(0.01, stream.close)
    closer.start()
    with pytest.raises(StreamClosed):
        stream.result(30)
    go.set()
    closer.join()


def test_the_cache_keeps_to_its_memory(model_folder: Path) -> None:
    each = bytes_per_block(tiny_config(), torch.float32)
    context = 128 // BLOCK_TOKENS * each
    with Engine.load(model_folder, EngineConfig(kv_cache_bytes=context + 3 * each + 1)) as engine:
        assert engine._pool.num_blocks == 11
        streams = [engine.submit(GenerationRequest(prompt=(5,), max_tokens=5)) for _ in range(20)]
        assert [stream.result(30).usage.completion_tokens for stream in streams] == [5] * 20
    with pytest.raises(NoMemory, match="lower max_context or raise kv_cache_bytes"):
        Engine.load(model_folder, EngineConfig(kv_cache_bytes=context - 1))
    with Engine.load(model_folder, EngineConfig(kv_cache_bytes=context - 1, max_context=64)) as engine:
        assert engine.context_tokens == 64


def test_the_dtype_is_the_checkpoints_where_the_processor_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch, that is: our kernels read bfloat16 fast on any processor."""
    folder = tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    monkeypatch.setattr("sihe.serving.engine.runner.is_supported", lambda _: False)
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("sihe.serving.engine.runner.has_bf16", lambda supported=supported: supported)
        runner = ModelRunner.load(folder, EngineConfig(), keep_model=True)
        assert next(runner.model.parameters()).dtype is expected


def test_bfloat16(model_folder: Path) -> None:
    with Engine.load(model_folder, EngineConfig(dtype="bfloat16", token_budget=40)) as engine:
        streams = [engine.submit(request) for request in requests(6, seed=1)]
        for request, stream in zip(requests(6, seed=1), streams, strict=True):
            assert stream.result(30).usage.completion_tokens == request.max_tokens


def test_an_int8_cache_holds_more_and_answers_alike_alone_and_beside_others(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {kind: bytes_per_block(tiny_config(), kind) for kind in (torch.int8, torch.bfloat16)}
    assert held[torch.int8] < 0.8 * held[torch.bfloat16]  # heads of 8 numbers, each with a scale of 4 bytes
    asked = requests(6, seed=1)
    with Engine.load(model_folder, EngineConfig(kv_dtype="int8", token_budget=40)) as engine:
        alone = [engine.submit(request).result(30).token_ids for request in asked]
        beside = [engine.submit(request) for request in asked]
        assert [stream.result(30).token_ids for stream in beside] == alone
    monkeypatch.setattr("sihe.serving.engine.runner.is_supported", lambda _: False)
    with pytest.raises(ConfigError, match=r"kv_dtype = 'int8' .* take bfloat16 or float32"):
        Engine.load(model_folder, EngineConfig(kv_dtype="int8"))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda folder: (folder / "config.json").unlink(), NotFound),
        (lambda folder: (folder / "config.json").write_text("{"), CorruptData),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), CorruptData),
        (lambda folder: (folder / "tokenizer.json").unlink(), NotFound),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), CorruptData),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 20), CorruptData),
        (lambda folder: drop_tensor(folder), CheckpointMismatch),
        (lambda folder: shrink_vocabulary(folder), CorruptData),
    ],
)
def test_damaged_folders_are_clear_errors(tmp_path: Path, damage: object, error: type[Exception]) -> None:
    folder = tiny_model(tmp_path / "model")
    assert callable(damage)
    damage(folder)
    with pytest.raises(error):
        Engine.load(folder)


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shrink_vocabulary(folder: Path) -> None:
    """The weights of another model, with fewer tokens than the tokenizer beside them."""
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:50].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))


def test_settings_are_checked_and_come_back() -> None:
    config = EngineConfig(max_batch_size=4, dtype="bfloat16")
    assert EngineConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config
    for bad in ({"dtype": "int3"}, {"max_batch_size": 0}, {"token_budget": 32}, {"speed": 1}, {"max_context": True}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            EngineConfig.from_mapping(bad)
