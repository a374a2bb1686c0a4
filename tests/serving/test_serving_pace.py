"""A long prompt holds the others' next token up by so many seconds, whatever the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sihe.core.clock import FakeClock
from sihe.core.errors import ConfigError
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.kv.blocks import BlockPool, BlockTable, root_key
from sihe.serving.engine.pace import LEAST_TOKENS, Pace
from sihe.serving.engine.ports import NoObserver, StepStats
from sihe.serving.engine.runner import ModelRunner
from sihe.serving.engine.scheduler import Scheduler
from sihe.serving.engine.tokenizer import ModelTokenizer
from sihe.serving.engine.types import GenerationRequest
from support.tiny_models import tiny_config, tiny_model

BUDGET = 512


@given(
    fixed_s=st.floats(0.001, 0.4),
    token_s=st.floats(0.0001, 0.05),
    tails=st.lists(st.integers(1, BUDGET), max_size=5),
)
def test_steps_come_to_take_as_long_as_they_shall(fixed_s: float, token_s: float, tails: list[int]) -> None:
    """Whatever was read before, of a model whose step takes so long for its weights and so long for a token."""
    pace = Pace(0.5)
    for tokens in [*tails, *[BUDGET] * (not tails)]:
        pace.add_step(tokens, fixed_s + token_s * tokens)
    for _ in range(200):
        tokens = min(BUDGET, pace.tokens or BUDGET)
        pace.add_step(tokens, fixed_s + token_s * tokens)
    wanted = min(BUDGET, max(LEAST_TOKENS, (0.5 - fixed_s) / token_s))
    assert min(BUDGET, pace.tokens or 0) == pytest.approx(wanted, rel=0.05, abs=1.5)


def test_what_read_no_prompt_says_nothing_of_prompts() -> None:
    pace = Pace(0.5)
    pace.add_step(0, 3.0)
    pace.add_step(7, 0.0)
    assert pace.tokens is None
    pace.add_step(10, 0.05)
    assert pace.tokens == 100
    pace.add_step(0, 3.0)
    assert pace.tokens == 100


def test_only_prompts_beside_those_that_decode_are_read_in_shorter_chunks() -> None:
    scheduler = Scheduler(BlockPool(100), max_running=4, token_budget=100)
    for id, length in ((1, 3), (2, 400)):
        scheduler.add(id, length, BlockTable(scheduler.pool, root_key(b"x"), []))
    plan = scheduler.plan(prompt_tokens=20)
    assert [chunk.length for chunk in plan.prefill] == [3, 97], "nobody waits for a next token"
    scheduler.advance(1, computed=3, length=4)
    scheduler.advance(2, computed=97, length=400)
    plan = scheduler.plan({1: 50}, prompt_tokens=20)
    assert [(chunk.id, chunk.length) for chunk in (*plan.decode, *plan.prefill)] == [(1, 1), (2, 20)]
    scheduler.advance(1, computed=4, length=5)
    scheduler.advance(2, computed=117, length=400)
    scheduler.remove(2)
    (chunk,) = scheduler.plan({1: 50}, prompt_tokens=20).decode
    assert chunk.drafts == 50, "tries are no prompt"


class Steps(NoObserver):
    """Tokens of each step that decoded, and of prompts."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, int]] = []

    def on_step(self, stats: StepStats) -> None:
        self.tokens.append((stats.decode_tokens, stats.prefill_tokens))


def test_a_slow_model_reads_a_long_prompt_in_steps_of_half_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path, config=tiny_config(max_positions=2048, eos=False))
    settings = EngineConfig(dtype="float32", token_budget=BUDGET)
    runner, clock, steps = ModelRunner.load(folder, settings), FakeClock(), Steps()
    forward = runner.forward

    def slow(feeds: Any) -> Tensor:
        clock.advance(0.01 * sum(len(feed.tokens) for feed in feeds))
        return forward(feeds)

    monkeypatch.setattr(runner, "forward", slow)
    tokenizer = ModelTokenizer.load(folder)
    with Engine(runner, tokenizer, settings, name="slow", observer=steps, clock=clock) as engine:
        talker = engine.submit(GenerationRequest(prompt=(5, 6, 7), max_tokens=1900, temperature=0))
        talker.next_event(30)
        engine.submit(GenerationRequest(prompt=tuple(range(5, 205)), max_tokens=1, temperature=0)).result(30)
        talker.close()
        engine.submit(GenerationRequest(prompt=tuple(range(6, 256)), max_tokens=1, temperature=0)).result(30)
    beside = [prompt for decoded, prompt in steps.tokens if decoded and prompt]
    assert sum(beside) == 200
    assert max(beside) == 50
    assert len(beside) == 5  # 49 and one more for the one that decodes
    assert (0, 250) in steps.tokens, "nobody else waits"


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e308, "fast", True])
def test_the_seconds_of_a_step_are_a_number(value: object) -> None:
    with pytest.raises(ConfigError, match="target_step_s") as raised:
        EngineConfig.from_mapping({"target_step_s": value})
    assert raised.value.key == "target_step_s"
