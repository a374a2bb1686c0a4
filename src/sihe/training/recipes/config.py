"""What a recipe is asked to do: a model, a task and stages, as frozen values that check themselves.

A recipe is a sequence of stages. The first trains the base model that the others start from, so that a recipe needs
nothing but its file. Pure: no I/O, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from sihe.core.errors import ConfigError, InvalidInput
from sihe.core.ids import check_name
from sihe.models.lora_config import LoraConfig
from sihe.training.config import ModelShape

PreferenceLoss = Literal["dpo", "ipo", "kto", "orpo"]
Divergence = Literal["forward", "reverse"]
Quantisation = Literal["none", "int8", "int4", "nf4"]
RolloutKind = Literal["local", "engine"]
Operation = Literal["+", "-"]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class TaskConfig:
    """Which sums there are: every pair of operands from 0 to `largest`."""

    largest: int = 29
    held_out: int = 128
    """Problems that are never trained on; the metrics are measured on them."""

    def __post_init__(self) -> None:
        _check("task.largest", self.largest >= 1, "at least 1", self.largest)
        most = (self.largest + 1) ** 2 - 1
        _check("task.held_out", 1 <= self.held_out <= most, f"in 1..{most} (all problems but one)", self.held_out)


@dataclass(frozen=True)
class Update:
    """How one stage moves weights."""

    steps: int
    """Optimizer steps."""
    batch: int
    """Sequences of one step, over all ranks; pairs count once."""
    peak_lr: float
    warmup_steps: int = 10
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    eval_every: int = 20
    """Steps from one measurement on the held-out problems to the next."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eval_every"):
            _check(f"update.{name}", getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name in ("peak_lr", "clip_norm"):
            value = getattr(self, name)
            _check(f"update.{name}", value > 0 and math.isfinite(value), "a positive number", value)
        steps = f"in 0..{self.steps} (steps)"
        _check("update.warmup_steps", 0 <= self.warmup_steps <= self.steps, steps, self.warmup_steps)
        _check("update.min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "between 0 and 1", self.min_lr_ratio)
        _check("update.weight_decay", self.weight_decay >= 0, "not negative", self.weight_decay)


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank matrices that are trained in place of the weights."""

    lora: LoraConfig
    base: Quantisation = "none"
    """How the frozen weights are kept: anything but "none" makes it QLoRA (arXiv 2305.14314, which takes "nf4")."""
    embedding: bool = False
    """Whether the vectors of tokens, into the model and out of it, are trained beside the adapter: no product that an
    adapter could change makes up for the vector of a token that the base model never saw."""

    def __post_init__(self) -> None:
        _check("adapter.base", self.base in get_args(Quantisation), " or ".join(get_args(Quantisation)), self.base)


@dataclass(frozen=True)
class PretrainStage:
    """The likelihood of plain text: right equations, without the form of a chat."""

    update: Update
    operation: Operation = "+"

    def __post_init__(self) -> None:
        _check("operation", self.operation in get_args(Operation), "'+' or '-'", self.operation)


@dataclass(frozen=True)
class SftStage:
    """Supervised fine-tuning on right answers. As a recipe's first stage it starts from random weights."""

    update: Update
    operation: Operation = "+"
    adapter: AdapterConfig | None = None

    def __post_init__(self) -> None:
        _check("operation", self.operation in get_args(Operation), "'+' or '-'", self.operation)


@dataclass(frozen=True)
class RewardStage:
    """A reward model from pairs of answers, beside the policy, which stays as it is."""

    update: Update


@dataclass(frozen=True)
class PreferenceStage:
    """The policy from pairs of answers, without a reward model."""

    update: Update
    loss: PreferenceLoss = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check("loss", self.loss in get_args(PreferenceLoss), " or ".join(get_args(PreferenceLoss)), self.loss)
        _check("beta", self.beta > 0, "positive", self.beta)
        _check("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)", self.label_smoothing)
        only_dpo = self.label_smoothing == 0 or self.loss == "dpo"
        _check("label_smoothing", only_dpo, f"0 with loss {self.loss!r}", self.label_smoothing)


@dataclass(frozen=True)
class PpoStage:
    """The policy from the reward model by PPO. `update.batch` rollouts are used for `epochs` steps each."""

    update: Update
    epochs: int = 4
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.5
    kl_coefficient: float = 0.05
    """Price of one nat of divergence from the policy that the stage began with, in standard deviations of the scores
    of that policy's completions."""
    kl_target: float | None = None
    """Nats a completion at which the price is held; `None` leaves the price as it is."""
    gamma: float = 1.0
    lam: float = 0.95
    max_tokens: int = 10

    def __post_init__(self) -> None:
        for name in ("clip", "value_clip"):
            _check(name, getattr(self, name) > 0, "positive", getattr(self, name))
        for name in ("value_coefficient", "kl_coefficient"):
            _check(name, getattr(self, name) >= 0, "not negative", getattr(self, name))
        for name in ("gamma", "lam"):
            _check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1", getattr(self, name))
        _check("kl_target", self.kl_target is None or self.kl_target > 0, "positive", self.kl_target)
        _check_rounds(self.update, self.epochs, self.max_tokens)


@dataclass(frozen=True)
class GrpoStage:
    """The policy from verifiable rewards, without a critic: `group` completions of each prompt are compared."""

    update: Update
    group: int = 8
    epochs: int = 2
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coefficient: float = 0.01
    scaled: bool = True
    """Whether advantages are in units of the group's deviation."""
    max_tokens: int = 10
    rollout: RolloutKind = "local"
    """Who samples: this process, or the serving engine, to which weights are sent."""
    sync_every: int = 1
    """Rounds of rollouts from one transfer of weights to the next."""
    max_staleness: int = 1
    """Rounds that the weights behind a rollout may be old."""
    sync_timeout_s: float = 30.0
    """The engine's time for each of pausing, taking weights and going on."""

    def __post_init__(self) -> None:
        _check("group", self.group >= 2, "at least 2 (completions are compared)", self.group)
        _check("update.batch", self.update.batch % self.group == 0, f"a multiple of group ({self.group})", self.group)
        _check("clip_low", 0 < self.clip_low < 1, "between 0 and 1", self.clip_low)
        _check("clip_high", self.clip_high > 0, "positive", self.clip_high)
        _check("kl_coefficient", self.kl_coefficient >= 0, "not negative", self.kl_coefficient)
        _check("rollout", self.rollout in get_args(RolloutKind), " or ".join(get_args(RolloutKind)), self.rollout)
        _check("sync_every", self.sync_every >= 1, "at least 1", self.sync_every)
        _check(
            "max_staleness", self.max_staleness >= self.sync_every - 1, "at least sync_every - 1", self.max_staleness
        )
        _check("sync_timeout_s", self.sync_timeout_s > 0, "positive", self.sync_timeout_s)
        _check_rounds(self.update, self.epochs, self.max_tokens)


@dataclass(frozen=True)
class DistilStage:
    """A smaller model from the next-token distributions of the one before."""

    update: Update
    student: ModelShape
    divergence: Divergence = "forward"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check(
            "divergence", self.divergence in get_args(Divergence), " or ".join(get_args(Divergence)), self.divergence
        )
        _check("temperature", self.temperature > 0, "positive", self.temperature)


Stage = PretrainStage | SftStage | RewardStage | PreferenceStage | PpoStage | GrpoStage | DistilStage
_KINDS: dict[str, type[Stage]] = {
    "pretrain": PretrainStage,
    "sft": SftStage,
    "reward": RewardStage,
    "preference": PreferenceStage,
    "ppo": PpoStage,
    "grpo": GrpoStage,
    "distil": DistilStage,
}


@dataclass(frozen=True)
class RecipeConfig:
    """A whole recipe. Raises `ConfigError` that names the key."""

    name: str
    metric: str
    """What the last stage must move, one of the values that it measures on held-out problems."""
    goal: Literal["up", "down"]
    model: ModelShape
    stages: tuple[Stage, ...]
    task: TaskConfig = field(default_factory=TaskConfig)
    context: int = 24
    """Longest sequence in tokens."""
    seed: int = 0
    checkpoint_every: int = 100
    """Steps; a stage's last step always writes one."""

    def __post_init__(self) -> None:
        try:
            check_name("recipe", self.name)
        except InvalidInput as error:
            raise ConfigError(f"recipe setting 'name': {error}", key="name") from error
        _check("goal", self.goal in ("up", "down"), "'up' or 'down'", self.goal)
        _check("context", self.context >= 8, "at least 8", self.context)
        _check("checkpoint_every", self.checkpoint_every >= 1, "at least 1", self.checkpoint_every)
        _check("seed", self.seed >= 0, "not negative", self.seed)
        _check("stages", len(self.stages) >= 1, "at least one stage", self.stages)
        first = self.stages[0]
        is_base = isinstance(first, PretrainStage | SftStage)
        _check("stages.0.kind", is_base, "pretrain or sft: it trains the base model", kind_of(first))
        has_reward = False
        for number, stage in enumerate(self.stages):
            has_reward |= isinstance(stage, RewardStage)
            _check(
                f"stages.{number}.kind", has_reward or not isinstance(stage, PpoStage), "after a reward stage", "ppo"
            )
        without_adapter = not isinstance(first, SftStage) or first.adapter is None
        _check("stages.0.adapter", without_adapter, "left out: there are no weights to freeze yet", "adapter")

    def public(self) -> dict[str, Any]:
        """Every setting as plain values; `from_mapping` takes them back."""
        values = asdict(self)
        values["stages"] = [{"kind": kind_of(stage), **asdict(stage)} for stage in self.stages]
        return values

    def identity(self, number: int) -> dict[str, Any]:
        """The settings that decide what stage `number` computes: those of it and of what comes before.

        Recipes that begin alike share their first stages.
        """
        values = self.public()
        shared = {key: values[key] for key in ("model", "task", "context", "seed")}
        return {**shared, "stages": values["stages"][: number + 1]}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RecipeConfig:
        """A recipe from plain values, such as YAML gives. Raises `ConfigError` for an unknown or missing key."""
        values = dict(values)
        stages = values.pop("stages", None)
        _check("stages", isinstance(stages, list) and bool(stages), "a list of stages", stages)
        assert isinstance(stages, list)
        built = []
        for number, item in enumerate(stages):
            _check(f"stages.{number}", isinstance(item, Mapping), "settings with a kind", item)
            kind = item.get("kind")
            _check(f"stages.{number}.kind", kind in _KINDS, " or ".join(_KINDS), kind)
            rest = {key: value for key, value in item.items() if key != "kind"}
            built.append(_build(_KINDS[kind], rest, f"stages.{number}."))
        # the stages are values already: only what is plain is left to build
        return _build(cls, values, "", stages=tuple(built))


def kind_of(stage: Stage) -> str:
    """The name by which a recipe's file asks for such a stage."""
    return next(kind for kind, made in _KINDS.items() if made is type(stage))


_NESTED: dict[str, type[Any]] = {
    "update": Update,
    "lora": LoraConfig,
    "adapter": AdapterConfig,
    "student": ModelShape,
    "model": ModelShape,
    "task": TaskConfig,
}


def _build(kind: type[_Value], values: Mapping[str, Any], prefix: str, **ready: Any) -> _Value:
    """A frozen value from plain ones, nested ones first. `ready` are values that are built already."""
    from pydantic import TypeAdapter, ValidationError

    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]  # every kind here is a dataclass
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown recipe setting {prefix + key!r}: known are {', '.join(known)}", key=prefix + key
            )
    plain = dict(values)
    for key, nested in _NESTED.items():
        if isinstance(plain.get(key), Mapping):
            plain[key] = _build(nested, plain[key], f"{prefix}{key}.")
    try:
        return TypeAdapter(kind).validate_python(plain | ready)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            raise ConfigError(f"{prefix[:-1]}: {cause}" if prefix else str(cause), key=cause.key) from error
        key = prefix + ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ConfigError(
                f"recipe setting {key!r} is missing: add it to the file or with --set", key=key
            ) from error
        raise ConfigError(f"recipe setting {key!r}: {first['msg'].lower()}, got {first['input']!r}", key=key) from error


def _check_rounds(update: Update, epochs: int, max_tokens: int) -> None:
    _check("epochs", epochs >= 1, "at least 1", epochs)
    _check("max_tokens", max_tokens >= 1, "at least 1", max_tokens)
    whole = update.steps % epochs == 0
    _check("update.steps", whole, f"a multiple of epochs ({epochs}): a round of rollouts is used whole", update.steps)


def _check(key: str, holds: bool, expected: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"recipe setting {key!r} must be {expected}, got {value!r}", key=key)
