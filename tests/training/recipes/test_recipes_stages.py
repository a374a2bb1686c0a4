"""Every stage trains what it should and nothing else; ranks and resumes change no number."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.decoder import Decoder
from sihe.models.quantised import dequantise, quantise
from sihe.training.errors import Diverged
from sihe.training.ranks import Ranks
from sihe.training.recipes.arithmetic import END, Arithmetic, Problem, arithmetic_chat
from sihe.training.recipes.config import (
    DistilStage,
    GrpoStage,
    PpoStage,
    PreferenceStage,
    PretrainStage,
    RecipeConfig,
    RewardStage,
    SftStage,
    TaskConfig,
    Update,
)
from sihe.training.recipes.distil import DistilObjective
from sihe.training.recipes.errors import StaleRollouts, WeightSyncFailed
from sihe.training.recipes.grpo import GrpoObjective, fresh_groups
from sihe.training.recipes.heads import Scorer, frozen
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.loop import StageLoop
from sihe.training.recipes.ppo import PpoObjective
from sihe.training.recipes.preference import PreferenceObjective
from sihe.training.recipes.pretrain import PretrainObjective
from sihe.training.recipes.reward import RewardObjective
from sihe.training.recipes.sampling import LocalRollout
from sihe.training.recipes.sft import SftObjective
from sihe.training.recipes.stages import Stages
from sihe.training.recipes.types import Completion, Measured, RecipeEvent, Terms
from support.tiny_recipes import MODEL, UPDATE, tiny_recipe

CONFIG = tiny_recipe()
STEPS = Update(steps=4, batch=8, peak_lr=1e-3, warmup_steps=0)


def small_policy(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    from sihe.models.config import ModelConfig

    return Decoder(ModelConfig(vocab_size=17, eos_token_id=END, **CONFIG.model.resolved(24)))


def small_lesson(ranks: Ranks | None = None) -> Lesson:
    problems = Arithmetic(CONFIG.task, seed=0)
    return Lesson(arithmetic_chat(), problems, ranks or Ranks(), context=24, seed=0)


def gradients(module: nn.Module, terms: list[Terms]) -> list[Tensor]:
    """Of the mean over all parts."""
    module.zero_grad()
    for part in terms:
        part.loss.backward()  # type: ignore[no-untyped-call]
    weight = sum(part.weight for part in terms)
    return [w.grad / weight for w in module.parameters() if w.grad is not None]


@pytest.mark.parametrize("loss", ["pretrain", "sft", "reward", "dpo", "ipo", "orpo", "distil"])
def test_two_ranks_have_the_gradient_of_one(loss: str) -> None:
    """Each rank's part is computed by itself: what a sum over ranks would add up is added up here."""

    def objective(lesson: Lesson) -> Any:
        policy = small_policy()
        if loss == "pretrain":
            return PretrainObjective(policy, lesson, PretrainStage(STEPS))
        if loss == "sft":
            return SftObjective(policy, lesson, SftStage(STEPS))
        if loss == "reward":
            scorer = Scorer(policy)
            nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
            return RewardObjective(scorer, lesson, RewardStage(STEPS))
        if loss == "distil":
            return DistilObjective(small_policy(1), policy, lesson, DistilStage(STEPS, CONFIG.model))
        return PreferenceObjective(policy, lesson, PreferenceStage(STEPS, loss=loss, beta=0.3))  # type: ignore[arg-type]

    whole = objective(small_lesson())
    expected = gradients(whole.module, [whole.terms(3)])
    parts = [objective(small_lesson(Ranks(rank, 2))) for rank in range(2)]
    for other in parts[1:]:
        other.module.load_state_dict(parts[0].module.state_dict())
    summed: list[Tensor] = []
    terms = [part.terms(3) for part in parts]
    weight = sum(item.weight for item in terms)
    for part, item in zip(parts, terms, strict=True):
        own = gradients(part.module, [item])
        summed = [a + b * item.weight / weight for a, b in zip(summed or [0.0] * len(own), own, strict=True)]
    assert weight == whole.terms(3).weight
    for ours, theirs in zip(summed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_pretraining_learns_every_token_of_a_document_and_nothing_of_chats() -> None:
    lesson = small_lesson()
    documents = lesson.documents(lesson.held_out)
    for row, problem in enumerate(lesson.held_out):
        learnt = documents.tokens[row][documents.mask[row].bool()].tolist()
        assert lesson.chat.tokenizer.decode(learnt[:-1]) == problem.long
        assert (documents.tokens[row, 0], documents.mask[row, 0], learnt[-1]) == (END, 0, END)
        assert documents.mask[row].sum() == len(problem.long) + 1
    update = Update(steps=250, batch=32, peak_lr=2e-2)
    # nothing is held back that the model has to find: with all problems but one seen, it ends what it saw
    memory = Lesson(arithmetic_chat(), Recalled(CONFIG.task, seed=0), Ranks(), context=24, seed=0)
    objective = PretrainObjective(small_policy(), memory, PretrainStage(update))
    before = objective.measure()
    StageLoop("pretrain", objective, update, Ranks()).run()
    after = objective.measure()
    assert before["accuracy"] == 0
    assert after["accuracy"] > 0.9
    assert after["nll"] < before["nll"] / 2


class Recalled(Arithmetic):
    """Asks after what it taught."""

    def __init__(self, config: TaskConfig, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        self.held_out = self.train


def test_a_reward_model_starts_without_an_opinion_and_leaves_the_policy_alone() -> None:
    policy = small_policy()
    before = copy.deepcopy(policy.state_dict())
    scorer = Scorer(policy)
    objective = RewardObjective(scorer, small_lesson(), RewardStage(STEPS))
    assert objective.measure() == {"pair_accuracy": 0.5, "margin": 0.0}
    StageLoop("reward", objective, STEPS, Ranks()).run()
    assert objective.measure()["margin"] != 0
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, before[name])


def test_the_reference_of_preferences_never_moves() -> None:
    policy = small_policy()
    objective = PreferenceObjective(policy, small_lesson(), PreferenceStage(STEPS))
    start = objective.measure()
    assert (start["pair_accuracy"], start["margin"]) == (0.5, 0.0)
    reference = copy.deepcopy(objective._reference.state_dict())
    StageLoop("dpo", objective, STEPS, Ranks()).run()
    assert objective.measure()["margin"] > 0
    for name, weight in objective._reference.state_dict().items():
        assert torch.equal(weight, reference[name])


def test_ppo_starts_at_ratio_one_and_prices_divergence() -> None:
    policy = small_policy()
    scorer = Scorer(policy)
    nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    stage = PpoStage(STEPS, epochs=2, kl_target=1e-6)
    objective = PpoObjective(policy, scorer, small_lesson(), stage)
    first = objective.terms(0)
    assert first.metrics["clipped"] == 0  # the policy has not moved since it sampled
    assert first.metrics["kl"] == pytest.approx(0, abs=1e-4)
    loop = StageLoop("ppo", objective, STEPS, Ranks())
    start = float(objective._actor.kl_coefficient)
    metrics = [loop.step(step) for step in range(4)]
    assert metrics[2]["kl"] != pytest.approx(0, abs=1e-6)
    # Ziegler et al.: two rounds so far; the first is below its target (price down), the second far above (price up)
    assert float(objective._actor.kl_coefficient) != start
    assert all(not weight.requires_grad for weight in objective._reward.parameters())


def test_the_scale_of_a_reward_model_does_not_matter_to_ppo() -> None:
    def scored_by(gain: float, offset: float, ranks: Ranks) -> PpoObjective:
        scorer = Scorer(small_policy())
        with torch.no_grad():
            scorer.head.weight.copy_(gain * torch.linspace(-1, 1, scorer.head.weight.numel()))
            scorer.head.bias.fill_(offset)
        return PpoObjective(small_policy(), scorer, small_lesson(ranks), PpoStage(STEPS, epochs=1, max_tokens=3))

    one, other = scored_by(1.0, 0.0, Ranks()), scored_by(7.0, -40.0, Ranks())
    measured = one.measure()
    assert other.measure()["score"] == pytest.approx(measured["score"], abs=1e-3)
    plain, scaled = one.terms(0), other.terms(0)
    assert float(scaled.loss.detach()) == pytest.approx(float(plain.loss.detach()), rel=1e-3)
    # every rank has the same scale: what it says of the held-out problems is what one rank alone says
    assert all(scored_by(1.0, 0.0, Ranks(rank, 2)).measure()["score"] == measured["score"] for rank in range(2))


def test_grpo_learns_from_what_differs_within_a_group() -> None:
    policy = small_policy()
    stage = GrpoStage(STEPS, group=4, epochs=2, kl_coefficient=0.0, max_tokens=3)
    objective = GrpoObjective(policy, LocalRollout(policy, end=END), small_lesson(), stage)
    terms = objective.terms(0)
    assert terms.metrics["reward"] == 0  # an untrained policy is never right: all groups are level
    assert terms.metrics["level_prompts"] == terms.weight
    assert gradients(policy, [terms])
    assert all(not grad.any() for grad in gradients(policy, [objective.terms(1)]))


@dataclass(frozen=True)
class Bandit(Problem):
    """Right is whatever begins with a 7."""

    def is_right(self, answer: str) -> bool:
        return answer.startswith("7")


class Bandits(Arithmetic):
    """The same questions, judged as bandits."""

    def draw(self, step: int, count: int) -> list[Problem]:
        return [Bandit(problem.a, problem.b) for problem in super().draw(step, count)]


@pytest.mark.parametrize("scaled", [True, False])
def test_grpo_brings_a_bandit_to_its_arm(scaled: bool) -> None:
    """Sign, mask and behaviour's log-probabilities at once: with one of them wrong another arm wins, or none."""
    update = Update(steps=40, batch=128, peak_lr=1e-2, warmup_steps=0)
    stage = GrpoStage(update, group=16, epochs=2, kl_coefficient=0.0, scaled=scaled, max_tokens=1)
    lesson = Lesson(arithmetic_chat(), Bandits(CONFIG.task, seed=0), Ranks(), context=24, seed=0)
    policy = small_policy()
    objective = GrpoObjective(policy, LocalRollout(policy, end=END), lesson, stage)
    loop = StageLoop("grpo", objective, update, Ranks())
    metrics = [loop.step(step) for step in range(update.steps)]
    assert metrics[0]["reward"] < 0.2
    assert metrics[-1]["reward"] > 0.95
    # the policy has not moved since it sampled in the first step of a round, and has in the second
    assert all(metrics[step]["clipped"] == 0 for step in range(0, update.steps, 2))
    assert any(metrics[step]["clipped"] > 0 for step in range(1, update.steps, 2))


class Unwilling:
    """A rollout that stops taking weights after the first."""

    def __init__(self, policy: Decoder) -> None:
        self._local = LocalRollout(copy.deepcopy(policy), end=END)
        self.sample = self._local.sample
        self.close = self._local.close

    def load(self, policy: Decoder, version: int) -> None:
        if version > 0:
            raise WeightSyncFailed("pausing", version, "no answer within 1 s")


def test_rollouts_that_are_too_old_are_not_learnt_from() -> None:
    policy = small_policy()
    stage = GrpoStage(STEPS, group=4, epochs=1, max_tokens=3, max_staleness=2)
    objective = GrpoObjective(policy, Unwilling(policy), small_lesson(), stage)
    staleness = [objective.terms(step).metrics["staleness"] / objective.terms(step).weight for step in range(3)]
    assert staleness == pytest.approx([0, 1, 2])
    with pytest.raises(StaleRollouts, match="max_staleness = 2: the policy is at weights 3 and the engine at 0"):
        objective.terms(3)


def test_a_group_with_one_stale_completion_is_left_out_whole() -> None:
    made = [Completion((END,), (0.0,), version) for version in (5, 5, 5, 2, 4, 4)]
    assert fresh_groups(made, 2, version=5, max_staleness=1) == [0, 1, 4, 5]
    assert fresh_groups(made, 2, version=5, max_staleness=3) == [0, 1, 2, 3, 4, 5]


def measured_by(config: RecipeConfig, folder: Path) -> tuple[list[Measured], Decoder]:
    events: list[RecipeEvent] = []
    made = Stages(config, folder, on_event=events.append).run()
    return [event for event in events if isinstance(event, Measured)], made.policy


ALL = [
    {"kind": "reward"},
    {"kind": "ppo", "epochs": 2, "max_tokens": 3},
    {"kind": "preference", "loss": "kto"},
    {"kind": "grpo", "group": 2, "epochs": 2, "max_tokens": 3},
    {"kind": "sft", "operation": "-", "adapter": {"lora": {"rank": 2, "targets": ["q_proj", "up_proj"]}}},
    {"kind": "pretrain", "operation": "-"},
    {"kind": "distil", "student": {**MODEL, "hidden_size": 8}},
]


def test_every_stage_after_every_other_and_the_same_again(tmp_path: Path) -> None:
    config = tiny_recipe(*ALL, checkpoint_every=2)
    events, policy = measured_by(config, tmp_path / "a")
    kinds = ("sft", "reward", "ppo", "preference", "grpo", "sft", "pretrain", "distil")
    assert [(event.stage[2:], event.step) for event in events] == [(kind, step) for kind in kinds for step in (0, 1, 2)]
    assert policy.config.hidden_size == 8
    again, other = measured_by(config, tmp_path / "b")
    assert again == events
    for ours, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # A third time over the first folder: nothing is computed, everything is known.
    taken_over, third = measured_by(config, tmp_path / "a")
    assert taken_over == events
    for ours, theirs in zip(policy.parameters(), third.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_interrupted_stage_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    stage = {"kind": "ppo", "epochs": 2, "max_tokens": 3, "kl_target": 0.01, "update": {**UPDATE, "steps": 6}}
    config = tiny_recipe({"kind": "reward"}, stage)
    events, policy = measured_by(config, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def interrupt(event: RecipeEvent) -> None:
        if isinstance(event, Measured) and event.stage == "3-ppo" and event.step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        Stages(config, tmp_path / "cut", on_event=interrupt).run()
    resumed, other = measured_by(config, tmp_path / "cut")
    assert resumed == events
    for ours, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_recipes_that_begin_alike_share_their_beginning(tmp_path: Path) -> None:
    measured_by(tiny_recipe({"kind": "reward"}), tmp_path)
    folders = {path.name for path in tmp_path.iterdir()}
    measured_by(tiny_recipe({"kind": "preference"}, name="other"), tmp_path)
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"sft", "reward", "preference"}
    assert len(list(tmp_path.iterdir())) == len(folders) + 1


@pytest.mark.parametrize(("base", "embedding"), [("none", False), ("none", True), ("nf4", False), ("nf4", True)])
def test_an_adapter_trains_little_and_ends_in_the_weights(tmp_path: Path, base: str, embedding: bool) -> None:
    adapter = {"lora": {"rank": 1, "targets": ["q_proj"]}, "base": base, "embedding": embedding}
    config = tiny_recipe({"kind": "sft", "operation": "-", "adapter": adapter})
    made = Stages(config, tmp_path).run()
    changed = {
        name
        for (name, before), after in zip(made.base.named_parameters(), made.policy.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    learnt = {"blocks.0.attention.qkv.weight"} | ({"embedding.weight"} if embedding else set())
    if base == "none":
        assert changed == learnt
    else:  # the other products are what their codes stand for
        after = dict(made.policy.named_parameters())
        coded = frozen(made.base)
        quantise(coded, base)  # type: ignore[arg-type]
        dequantise(coded)
        differs = {name for name, weight in coded.named_parameters() if not torch.equal(weight, after[name])}
        assert differs == learnt
    assert all(weight.requires_grad for weight in made.policy.parameters())


def test_an_engine_that_nobody_handed_in_is_a_wrong_setting(tmp_path: Path) -> None:
    config = tiny_recipe({"kind": "grpo", "group": 2, "epochs": 2, "rollout": "engine"})
    with pytest.raises(ConfigError, match="no engine was handed in"):
        Stages(config, tmp_path).run()


def test_a_loss_that_is_no_number_stops_the_stage() -> None:
    policy = small_policy()
    with torch.no_grad():
        policy.norm.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="step 1"):
        StageLoop("sft", SftObjective(policy, small_lesson(), SftStage(STEPS)), STEPS, Ranks()).step(0)
