"""The parts of a `ModelConfig` beside its sizes: attention, positions, layers. Pure: needs no torch.

Their defaults are a Llama's. Each checks itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from sihe.core.errors import ConfigError

PositionKind = Literal["rope", "learned", "sinusoidal", "relative", "alibi", "none"]
ScalingKind = Literal["linear", "dynamic", "llama3", "yarn"]
Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Task = Literal["next_token", "masked_token", "pooled", "hidden", "scored"]


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention: keys and values come from one narrow vector (DeepSeek-AI 2024, arXiv 2405.04434).

    `kv_rank` is the width of that vector, `q_rank` that of the queries' own (None: queries come from the stream). Of
    `head_dim`, `rotary_dim` carry the position; they are one key for all heads. A head's values are `value_dim` wide.
    """

    kv_rank: int
    rotary_dim: int
    value_dim: int
    q_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_rank", "rotary_dim", "value_dim"):
            _check_size(self, "attention.latent", name)
        if self.q_rank is not None:
            _check_size(self, "attention.latent", "q_rank")
        if self.rotary_dim % 2:
            raise ConfigError(
                f"attention.latent.rotary_dim is even, got {self.rotary_dim}", key="attention.latent.rotary_dim"
            )


@dataclass(frozen=True)
class AttentionConfig:
    """Who sees whom, and what stands around the products.

    `causal` positions see themselves and earlier ones, others all. With a `window` a position sees those less than
    `window` away, itself among them. `qk_norm` brings each query and key to unit root mean square before its rotation.
    """

    causal: bool = True
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    latent: LatentConfig | None = None

    def __post_init__(self) -> None:
        part(self, "latent", LatentConfig, "attention.latent", optional=True)
        _check_flags(self, "attention", "causal", "qkv_bias", "out_bias", "qk_norm")
        if self.window is not None:
            _check_size(self, "attention", "window")
        if self.latent is not None and (self.qkv_bias or self.out_bias or self.qk_norm):
            raise ConfigError("latent attention has no biases and no qk_norm", key="attention.latent")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary angles for longer sequences than the `original_positions` of the first training.

    - `linear`: all angles are divided by `factor` (Chen et al. 2023, arXiv 2306.15595).
    - `dynamic`: the base grows with the sequence once it is longer than the original, so that the slowest angle
      is as if divided by `factor` times that growth (NTK-aware; Peng et al. 2023, arXiv 2309.00071, appendix B.1).
    - `llama3`: slow angles are divided, fast ones kept, with a ramp between `low_frequency` and `high_frequency` turns
      in the original length (Llama Team 2024, arXiv 2407.21783, and the code of Llama 3.1).
    - `yarn`: a ramp between `beta_slow` and `beta_fast` turns, and queries and keys scaled by `attention_factor` (None:
      0.1 ln(factor) + 1); with `truncate` the ramp begins and ends at whole dims (Peng et al., section 3.3 and 3.4).
    """

    kind: ScalingKind
    factor: float
    original_positions: int
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_choice(self, "positions.scaling", "kind", get_args(ScalingKind))
        _check_size(self, "positions.scaling", "original_positions")
        for name in ("factor", "low_frequency", "high_frequency", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                key = f"positions.scaling.{name}"
                raise ConfigError(f"{key} is a positive number, got {value!r}", key=key)
        if self.factor < 1:
            raise ConfigError(
                f"positions.scaling.factor is at least 1, got {self.factor!r}", key="positions.scaling.factor"
            )


@dataclass(frozen=True)
class PositionConfig:
    """How a token's place enters.

    - `rope`: queries and keys are turned (`rope_theta` of the model, and `scaling`).
    - `learned`: a vector for each place is added to the embedding. `sinusoidal`: a fixed one (Vaswani et al. 2017,
      arXiv 1706.03762, section 3.5).
    - `relative`: a learnt number per head and distance is added to the score; distances share `buckets`, one each when
      near and growing ones up to `max_distance` (Raffel et al. 2019, arXiv 1910.10683, section 2.1).
    - `alibi`: the score falls with the distance, at a slope per head (Press et al. 2021, arXiv 2108.12409).
    - `none`: only the causal mask tells places apart.

    The vectors of `learned` places begin at row `offset` of their table (RoBERTa's at 2).
    """

    kind: PositionKind = "rope"
    scaling: RopeScaling | None = None
    buckets: int = 32
    max_distance: int = 128
    offset: int = 0

    def __post_init__(self) -> None:
        part(self, "scaling", RopeScaling, "positions.scaling", optional=True)
        _check_choice(self, "positions", "kind", get_args(PositionKind))
        _check_size(self, "positions", "buckets")
        _check_size(self, "positions", "max_distance")
        if not isinstance(self.offset, int) or isinstance(self.offset, bool) or self.offset < 0:
            raise ConfigError(
                f"positions.offset is a whole number of 0 or more, got {self.offset!r}", key="positions.offset"
            )
        if self.offset and self.kind != "learned":
            raise ConfigError(f"positions.offset goes with 'learned', got {self.kind!r}", key="positions.offset")
        if self.scaling is not None and self.kind != "rope":
            raise ConfigError(f"positions.scaling goes with 'rope', got {self.kind!r}", key="positions.scaling")
        if self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise ConfigError(
                f"positions.buckets is a multiple of 4, less than twice max_distance, got {self.buckets}",
                key="positions.buckets",
            )


@dataclass(frozen=True)
class LayerConfig:
    """Norms, the dense feed-forward layer, and what the embedding is made of.

    `norm_first` normalises what a layer reads and the last stream, else each sum is normalised after its layer. A
    `gated` layer is SwiGLU, others are down(activation(up(x))). `token_types` > 0 adds an embedding of segments.
    """

    norm: Norm = "rms"
    norm_first: bool = True
    gated: bool = True
    activation: Activation = "silu"
    mlp_bias: bool = False
    embedding_norm: bool = False
    token_types: int = 0

    def __post_init__(self) -> None:
        _check_choice(self, "layers", "norm", get_args(Norm))
        _check_choice(self, "layers", "activation", get_args(Activation))
        _check_flags(self, "layers", "norm_first", "gated", "mlp_bias", "embedding_norm")
        if not isinstance(self.token_types, int) or isinstance(self.token_types, bool) or self.token_types < 0:
            raise ConfigError(
                f"layers.token_types is a whole number of 0 or more, got {self.token_types!r}", key="layers.token_types"
            )
        if self.gated and (self.activation != "silu" or self.mlp_bias):
            raise ConfigError("a gated layer has the activation 'silu' and no bias", key="layers.gated")


def part(owner: object, name: str, kind: type[Any], key: str, *, optional: bool = False) -> None:
    """Lets the field `name` of a frozen value be given as a mapping, as JSON has it. Raises `ConfigError`."""
    value = getattr(owner, name)
    if isinstance(value, dict):
        unknown = value.keys() - kind.__dataclass_fields__.keys()
        if unknown:
            raise ConfigError(f"{key} has no {sorted(unknown)[0]!r}", key=key)
        try:
            object.__setattr__(owner, name, kind(**value))
        except TypeError as error:
            raise ConfigError(f"{key} is incomplete: {error}", key=key) from error
    elif not (isinstance(value, kind) or (optional and value is None)):
        raise ConfigError(f"{key} is a mapping, got {value!r}", key=key)


def _check_size(owner: object, prefix: str, name: str) -> None:
    value = getattr(owner, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        key = f"{prefix}.{name}"
        raise ConfigError(f"{key} is a positive whole number, got {value!r}", key=key)


def _check_flags(owner: object, prefix: str, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(owner, name), bool):
            key = f"{prefix}.{name}"
            raise ConfigError(f"{key} is true or false, got {getattr(owner, name)!r}", key=key)


def _check_choice(owner: object, prefix: str, name: str, choices: tuple[str, ...]) -> None:
    if getattr(owner, name) not in choices:
        key = f"{prefix}.{name}"
        raise ConfigError(f"{key} is one of {', '.join(choices)}, got {getattr(owner, name)!r}", key=key)
