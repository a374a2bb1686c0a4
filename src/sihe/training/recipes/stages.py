"""The stages of a recipe, one after the other, for one seed: what each makes is what the next starts from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import torch

from sihe.core.errors import ConfigError
from sihe.core.files import exclusive
from sihe.models.checkpoint import save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.checkpoint import Checkpoints
from sihe.training.config import ModelShape
from sihe.training.ranks import Ranks
from sihe.training.recipes.adapters import TrainedAdapter, attach_adapter
from sihe.training.recipes.arithmetic import END, Arithmetic, arithmetic_chat, write_tokenizer
from sihe.training.recipes.config import (
    DistilStage,
    GrpoStage,
    PpoStage,
    PreferenceStage,
    PretrainStage,
    RecipeConfig,
    RewardStage,
    SftStage,
    Stage,
    kind_of,
)
from sihe.training.recipes.distil import DistilObjective
from sihe.training.recipes.grpo import GrpoObjective
from sihe.training.recipes.heads import Scorer, frozen
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.loop import StageLoop
from sihe.training.recipes.ports import Objective, OpenRollout, Rollout
from sihe.training.recipes.ppo import PpoObjective
from sihe.training.recipes.preference import PreferenceObjective
from sihe.training.recipes.pretrain import PretrainObjective
from sihe.training.recipes.reward import RewardObjective
from sihe.training.recipes.sampling import LocalRollout
from sihe.training.recipes.sft import SftObjective
from sihe.training.recipes.types import RecipeEvent


@dataclass(frozen=True)
class Products:
    """What the stages so far have made."""

    base: Decoder
    """The model after the first stage, as it was then."""
    policy: Decoder
    reward: Scorer | None = None


class Stages:
    """Runs a recipe for `config.seed`. `open_rollout` samples by an engine.

    Each stage keeps its checkpoints in a folder under `folder` that is named by what it computes: a recipe that is run
    again goes on where it was, and one that begins as another did takes over the stages that they share.
    """

    def __init__(
        self,
        config: RecipeConfig,
        folder: Path,
        *,
        ranks: Ranks | None = None,
        open_rollout: OpenRollout | None = None,
        on_event: Callable[[RecipeEvent], None] = lambda _event: None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._ranks = ranks or Ranks()
        self._open_rollout = open_rollout
        self._on_event = on_event
        self._chat = arithmetic_chat()

    def run(self) -> Products:
        """Every stage.

        Raises `Busy` while another process runs one of them, `Diverged`, `StaleRollouts`, and `ConfigError` for an
        engine that nobody handed in.
        """
        torch.manual_seed(self._config.seed)  # every rank draws the same first weights
        policy = Decoder(self._shape(self._config.model))
        products = Products(base=policy, policy=policy)
        for number, stage in enumerate(self._config.stages):
            products = self._run(number, stage, products)
            if number == 0:
                products = replace(products, base=frozen(products.policy))
        return products

    def _run(self, number: int, stage: Stage, products: Products) -> Products:
        name = f"{number + 1}-{kind_of(stage)}"
        identity = self._config.identity(number)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        folder = self._folder / f"{kind_of(stage)}-{digest}"
        policy, reward = products.policy, products.reward
        rollout: Rollout | None = None
        adapter: TrainedAdapter | None = None
        objective: Objective
        lesson = self._lesson(stage)
        match stage:
            case PretrainStage():
                objective = PretrainObjective(policy, lesson, stage)
            case SftStage():
                objective = SftObjective(policy, lesson, stage)
                if stage.adapter is not None:
                    adapter = attach_adapter(policy, stage.adapter, seed=self._config.seed)
            case RewardStage():
                reward = Scorer(policy)
                objective = RewardObjective(reward, lesson, stage)
            case PreferenceStage():
                objective = PreferenceObjective(policy, lesson, stage)
            case PpoStage():
                assert reward is not None  # the configuration puts a reward stage before
                objective = PpoObjective(policy, reward, lesson, stage)
            case GrpoStage():
                rollout = self._rollout(stage, policy, folder)
                objective = GrpoObjective(policy, rollout, lesson, stage)
            case DistilStage():
                torch.manual_seed(self._config.seed)
                student = Decoder(self._shape(stage.student))
                objective = DistilObjective(student, policy, lesson, stage)
                policy = student
            case _:
                assert_never(stage)
        try:
            with nullcontext() if self._ranks.rank else exclusive(folder / ".lock", timeout_s=0):
                self._train(name, objective, stage, folder, identity)
        finally:
            if rollout is not None:
                rollout.close()
        if adapter is not None:
            adapter.merge()
        return replace(products, policy=policy, reward=reward)

    def _train(self, name: str, objective: Objective, stage: Stage, folder: Path, identity: dict[str, Any]) -> None:
        epochs = stage.epochs if isinstance(stage, PpoStage | GrpoStage) else 1
        StageLoop(
            name,
            objective,
            stage.update,
            self._ranks,
            checkpoints=Checkpoints(folder / "checkpoints", identity, keep=1, ranks=self._ranks),
            history=folder / "measured.json",
            # a round of rollouts is not kept: a checkpoint lies between two
            checkpoint_every=-(-self._config.checkpoint_every // epochs) * epochs,
            on_event=self._on_event,
        ).run()

    def _rollout(self, stage: GrpoStage, policy: Decoder, folder: Path) -> Rollout:
        if stage.rollout == "local":
            return LocalRollout(policy, end=END)
        if self._open_rollout is None:
            raise ConfigError(
                "recipe setting 'rollout' is 'engine', and no engine was handed in: run it with  sihe train recipe, "
                "or set rollout: local",
                key="rollout",
            )
        model_folder = folder / f"policy-{self._ranks.rank}"
        write_model(policy, model_folder)
        return self._open_rollout(stage, model_folder)

    def _lesson(self, stage: Stage) -> Lesson:
        config = self._config
        operation = stage.operation if isinstance(stage, PretrainStage | SftStage) else "+"
        problems = Arithmetic(config.task, seed=config.seed, operation=operation)
        return Lesson(self._chat, problems, self._ranks, context=config.context, seed=config.seed)

    def _shape(self, shape: ModelShape) -> ModelConfig:
        vocabulary = self._chat.tokenizer.get_vocab_size()
        return ModelConfig(vocab_size=vocabulary, eos_token_id=END, **shape.resolved(self._config.context))


def write_model(policy: Decoder, folder: Path) -> None:
    """Writes a model folder with the tokenizer and chat template of the task."""
    save_model(policy, folder)
    write_tokenizer(folder)
