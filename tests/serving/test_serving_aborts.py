"""Readers that leave at any moment: every block comes back, and who stays is not disturbed."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from sihe.core.clock import FakeClock
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.draft import DraftModel, load_proposer
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.runner import ModelRunner
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.tokenizer import ModelTokenizer
from sihe.serving.engine.types import Constraint, GenerationRequest

WITNESS = GenerationRequest(prompt=(7, 8, 9) * 9, max_tokens=40, temperature=0)
BEGINNINGS = [tuple(random.Random(number).randrange(5, 300) for _ in range(40)) for number in range(3)]


def any_request(source: random.Random) -> GenerationRequest:
    """Of every kind: long and short, with shared beginnings, urgent or not, of several tenants, constrained, echoed."""
    beginning = source.choice([(), (), *BEGINNINGS])
    extras: dict[str, object] = source.choice(
        [
            {},
            {},
            {"temperature": 0.0},
            {"seed": 5, "top_p": 0.9},
            {"echo": True, "logprobs": 1},
            {"repetition_penalty": 1.2},
            {"constraint": Constraint("regex", "[a-z]{5,40}")},
        ]
    )
    return GenerationRequest(
        prompt=(*beginning, *(source.randrange(5, 300) for _ in range(source.randrange(1, 50)))),
        max_tokens=source.randrange(1, 30),
        priority=source.choice([0, 0, 0, 1, -1]),
        tenant=source.choice(["a", "b"]),
        **extras,  # type: ignore[arg-type]
    )


def leave_at_random(engine: Engine, aborts: int, seed: int) -> None:
    """Starts requests and leaves each at some moment, until `aborts` were left before their end."""
    source = random.Random(seed)
    running: list[GenerationStream] = []
    while aborts > 0:
        running.append(engine.submit(any_request(source)))
        if source.random() < 0.2:  # let some steps pass
            source.choice(running).next_event(30)
        while len(running) > 12:
            stream = running.pop(source.randrange(len(running)))
            aborts -= not stream._ended
            stream.close()
    for stream in running:
        stream.close()


def open_engine(folder: Path, speculation: str) -> Engine:
    """A pool that is a third of what the batch would like, a small budget, and a clock that makes proposals free."""
    block = ModelRunner.load(folder, EngineConfig(max_batch_size=1)).bytes_per_block
    settings = EngineConfig(
        max_batch_size=6,
        token_budget=24,
        max_waiting=100_000,
        kv_cache_bytes=14 * block,
        speculation=speculation,  # type: ignore[arg-type] # one of the literals
        draft_model=str(folder) if speculation == "draft" else None,
    )
    runner, tokenizer = ModelRunner.load(folder, settings), ModelTokenizer.load(folder)
    proposer = load_proposer(settings, tokenizer, runner)
    return Engine(runner, tokenizer, settings, name="aborts", proposer=proposer, clock=FakeClock())


def check(folder: Path, speculation: str, *, aborts: int, readers: int) -> None:
    """`readers` threads leave `aborts` requests together, while one request is read to its end, over and over."""
    with open_engine(folder, speculation) as engine:
        expected = engine.submit(WITNESS).result(30).token_ids
        failed: list[BaseException] = []

        def leave(seed: int) -> None:
            try:
                leave_at_random(engine, aborts // readers, seed)
            except BaseException as error:
                failed.append(error)
                raise

        threads = [threading.Thread(target=leave, args=(seed,)) for seed in range(readers)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert engine.submit(WITNESS).result(60).token_ids == expected
        assert failed == []
        assert engine.submit(WITNESS).result(60).token_ids == expected
        engine.close(drain=True)
        assert (engine._pool.num_used, engine.num_sequences) == (0, 0)
        scheduler = engine._scheduler
        assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
        assert (len(scheduler._entries), len(scheduler._promised)) == (0, 0), "something of who left is left"
        if engine._speculation is not None:
            assert not engine._speculation._kept
            proposer = engine._speculation._proposer
            assert not isinstance(proposer, DraftModel) or proposer.num_used_blocks == 0


@pytest.mark.parametrize("speculation", ["none", "ngram", "draft"])
def test_aborts_leave_nothing_behind(model_folder: Path, speculation: str) -> None:
    check(model_folder, speculation, aborts=300, readers=2)


@pytest.mark.slow
@pytest.mark.parametrize("speculation", ["none", "draft"])
def test_ten_thousand_aborts_leave_nothing_behind(model_folder: Path, speculation: str) -> None:
    check(model_folder, speculation, aborts=10_000, readers=4)
