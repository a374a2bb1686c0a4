"""Rollouts by the serving engine: the same log-probabilities as training, new weights between rounds, no hanging."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sihe.cli.rollout import EngineRollout, open_engine_rollout
from sihe.models.checkpoint import load_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.ranks import Ranks
from sihe.training.recipes.arithmetic import END, Arithmetic, arithmetic_chat
from sihe.training.recipes.config import GrpoStage, Update
from sihe.training.recipes.errors import WeightSyncFailed
from sihe.training.recipes.grpo import GrpoObjective
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.logprobs import next_token_logprobs
from sihe.training.recipes.loop import StageLoop
from sihe.training.recipes.sampling import sample_completions
from sihe.training.recipes.sequences import joined
from sihe.training.recipes.stages import Stages, write_model
from sihe.training.recipes.types import Completion, Measured, RecipeEvent, Sampling, Terms
from sihe.training.recipes.weight_sync import SyncState, Timeouts
from support.tiny_models import tiny_model
from support.tiny_recipes import tiny_recipe

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15]] * 3
GREEDY = Sampling(6, temperature=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


@pytest.fixture
def rollout(folder: Path) -> Iterator[EngineRollout]:
    opened = EngineRollout(folder, Timeouts(pause_s=20, transfer_s=20, resume_s=20))
    yield opened
    opened.close()


def other_policy(folder: Path) -> Decoder:
    return load_model(tiny_model(folder.parent / "other", seed=7))


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


def test_the_engine_draws_by_the_probabilities_that_training_computes(rollout: EngineRollout, folder: Path) -> None:
    policy = load_model(folder)
    completions = rollout.sample(PROMPTS, Sampling(6), seed=3)
    assert completions == rollout.sample(PROMPTS, Sampling(6), seed=3)
    assert tokens(completions) != tokens(rollout.sample(PROMPTS, Sampling(6), seed=4))
    batch = joined(PROMPTS, tokens(completions))
    with torch.no_grad():
        logps_BT = next_token_logprobs(policy, batch.tokens)
    for row, completion in enumerate(completions):
        ours = torch.tensor(completion.logprobs)
        torch.testing.assert_close(logps_BT[row, batch.target_mask[row].bool()], ours, atol=1e-4, rtol=1e-4)


def test_new_weights_answer_from_then_on(rollout: EngineRollout, folder: Path) -> None:
    old, new = load_model(folder), other_policy(folder)
    expected = [tokens(sample_completions(policy, PROMPTS, GREEDY, seed=0, end=1)) for policy in (old, new)]
    assert expected[0] != expected[1]
    before = rollout.sample(PROMPTS, GREEDY, seed=0)
    rollout.load(new, 4)
    after = rollout.sample(PROMPTS, GREEDY, seed=0)
    assert [tokens(before), tokens(after)] == expected
    assert {completion.version for completion in before} == {0}
    assert {completion.version for completion in after} == {4}


def test_no_completion_is_made_by_two_sets_of_weights(rollout: EngineRollout, folder: Path) -> None:
    policies = [load_model(folder), other_policy(folder)]
    expected = [tokens(sample_completions(policy, PROMPTS, GREEDY, seed=0, end=1)) for policy in policies]
    wrong: list[object] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.is_set():
            try:
                made = rollout.sample(PROMPTS, GREEDY, seed=0)
            except WeightSyncFailed:  # the gate is closed at the moment
                continue
            if tokens(made) != expected[made[0].version % 2]:
                wrong.append(made)

    sampler = threading.Thread(target=sample)
    sampler.start()
    for version in range(1, 9):
        rollout.load(policies[version % 2], version)
    stop.set()
    sampler.join()
    assert wrong == []


def test_an_engine_that_stops_answering_keeps_its_weights_and_comes_back(folder: Path) -> None:
    rollout = EngineRollout(folder, Timeouts(pause_s=0.05, transfer_s=20, resume_s=20))
    policy = other_policy(folder)
    rollout._sampling += 1  # a sample that never ends
    with pytest.raises(WeightSyncFailed, match="pausing"):
        rollout.load(policy, 1)
    assert rollout.sync.state is SyncState.FAILED
    rollout._sampling -= 1
    assert rollout.sample(PROMPTS, GREEDY, seed=0)[0].version == 0
    rollout.load(policy, 2)
    assert rollout.sample(PROMPTS, GREEDY, seed=0)[0].version == 2
    rollout.close()


def test_half_of_a_transfer_is_never_sampled_from(rollout: EngineRollout, folder: Path) -> None:
    policy = other_policy(folder)
    del policy.blocks[1]  # the transfer breaks off in the middle
    with pytest.raises(WeightSyncFailed, match="transferring"):
        rollout.load(policy, 1)
    with pytest.raises(WeightSyncFailed):
        rollout.sample(PROMPTS, GREEDY, seed=0)
    whole = other_policy(folder)
    rollout.load(whole, 2)
    expected = tokens(sample_completions(whole, PROMPTS, GREEDY, seed=0, end=1))
    assert tokens(rollout.sample(PROMPTS, GREEDY, seed=0)) == expected


def test_a_dead_engine_is_named(rollout: EngineRollout, folder: Path) -> None:
    rollout._engine.close(drain=False)
    with pytest.raises(WeightSyncFailed, match="EngineDead"):
        rollout.load(other_policy(folder), 1)


def test_every_round_of_grpo_begins_on_policy_with_the_engine(folder: Path) -> None:
    """What the engine says of its tokens is what the trainer computes with the weights of that very round."""
    config = tiny_recipe()
    policy = Decoder(ModelConfig(vocab_size=17, eos_token_id=END, **config.model.resolved(24)))
    write_model(policy, folder)
    update = Update(steps=6, batch=16, peak_lr=0.05, warmup_steps=0)
    stage = GrpoStage(update, group=4, epochs=2, max_tokens=3, clip_low=1e-3, clip_high=1e-3, rollout="engine")
    lesson = Lesson(arithmetic_chat(), Arithmetic(config.task, seed=0), Ranks(), context=24, seed=0)
    rollout = open_engine_rollout(stage, folder)
    loop = StageLoop("grpo", Restless(policy, rollout, lesson, stage), update, Ranks())
    metrics = [loop.step(step) for step in range(update.steps)]
    rollout.close()
    assert [step["staleness"] for step in metrics] == [0] * 6
    assert [step["clipped"] for step in metrics[::2]] == [0, 0, 0]
    assert all(step["clipped"] > 0.5 for step in metrics[1::2])


class Restless(GrpoObjective):
    """Moves the policy far in every step: rewards alone, all zero in an untrained policy, would not move it."""

    def terms(self, step: int) -> Terms:
        terms = super().terms(step)
        tokens = torch.tensor([[2, 5, 6, 3, 7, 8]])
        return replace(terms, loss=terms.loss - terms.weight * next_token_logprobs(self.module, tokens).mean())


def test_grpo_with_the_engine(tmp_path: Path) -> None:
    stage = {"kind": "grpo", "group": 2, "epochs": 1, "max_tokens": 3, "rollout": "engine"}
    events: list[RecipeEvent] = []
    Stages(tiny_recipe(stage), tmp_path, open_rollout=open_engine_rollout, on_event=events.append).run()
    steps = [event for event in events if event.stage == "2-grpo" and not isinstance(event, Measured)]
    assert [event.metrics["staleness"] for event in steps] == [0, 0]
