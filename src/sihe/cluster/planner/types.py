"""The planner's values: a network's shape, a cluster, and a layout of the one on the other.

Sizes are whole numbers, memory is bytes, time is seconds, bandwidth is bytes a second in one direction.
Pure: no torch, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sihe.cluster.collectives.costs import Link
from sihe.core.errors import ConfigError

Family = Literal["gpt", "llama"]
Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv", "dualpipe-v"]
Recompute = Literal["none", "selective", "full"]
Zero = Literal[0, 1, 2, 3]
AXES = ("pp", "dp", "shard", "cp", "tp")
"""From the outermost to the innermost: ranks that differ in the last one only are neighbours."""
ELEMENT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class TransformerShape:
    """The sizes of a decoder. `gpt` has LayerNorm, biases, learned positions, GELU and dropout, as in Megatron; `llama`
    has RMSNorm, rotary positions and a gated feed-forward layer (three matrices), without biases and dropout.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the feed-forward layer; with `experts`, of one of them."""
    vocab: int
    sequence: int
    """Tokens of one sample."""
    family: Family = "llama"
    tied: bool = True
    """The head is the embedding."""
    experts: int = 0
    experts_per_token: int = 0
    shared_ffn: int = 0
    """Width of the expert that all tokens share."""

    def __post_init__(self) -> None:
        for key in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "sequence"):
            _check(f"model.{key}", getattr(self, key) >= 1, "at least 1", getattr(self, key))
        _check("model.kv_heads", self.heads % self.kv_heads == 0, f"a divisor of heads ({self.heads})", self.kv_heads)
        _check("model.family", self.family in get_args(Family), " or ".join(get_args(Family)), self.family)
        if self.experts:
            _check(
                "model.experts_per_token",
                1 <= self.experts_per_token <= self.experts,
                f"in 1..{self.experts}",
                self.experts_per_token,
            )

    @property
    def attention_width(self) -> int:
        """Of all query heads together."""
        return self.heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Of one layer, its matrices only."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def expert_parameters(self) -> int:
        """Of one expert, or of the feed-forward layer of a dense model, its matrices only."""
        return (3 if self.family == "llama" else 2) * self.hidden * self.ffn

    @property
    def shared_parameters(self) -> int:
        """Of one layer of a mixture: the shared expert and the router; 0 for a dense model."""
        return self.hidden * (3 * self.shared_ffn + self.experts) if self.experts else 0

    @property
    def vector_parameters(self) -> int:
        """Norms and biases of one layer."""
        if self.family == "llama":
            return 2 * self.hidden
        rows = self.head_dim * (self.heads + 2 * self.kv_heads)
        return 4 * self.hidden + rows + self.hidden + self.ffn + self.hidden

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer, with all its experts."""
        experts = max(self.experts, 1) * self.expert_parameters
        return self.attention_parameters + experts + self.shared_parameters + self.vector_parameters

    @property
    def embedding_parameters(self) -> int:
        """Weights below the first layer."""
        return self.vocab * self.hidden + (self.sequence * self.hidden if self.family == "gpt" else 0)

    @property
    def head_parameters(self) -> int:
        """Weights above the last layer; a tied head counts as the embedding."""
        norm = self.hidden * (2 if self.family == "gpt" else 1)
        return norm + (0 if self.tied else self.vocab * self.hidden)

    @property
    def parameters(self) -> int:
        """Weights in all."""
        return self.layers * self.layer_parameters + self.embedding_parameters + self.head_parameters

    @property
    def active_matrix_parameters(self) -> int:
        """Weights of one layer's matrices that one token meets."""
        experts = (self.experts_per_token if self.experts else 1) * self.expert_parameters
        return self.attention_parameters + experts + self.shared_parameters


@dataclass(frozen=True)
class ClusterSpec:
    """Equal nodes with equal devices; `inside` is the link of a device within its node, `between` to other nodes."""

    name: str
    nodes: int
    per_node: int
    memory_bytes: float
    """Of one device."""
    memory_bandwidth: float
    """Peak of one device's memory."""
    peak_flops: dict[Precision, float]
    """Of one device: dense matrix products a second, by precision."""
    inside: Link
    between: Link
    """Of one device: what the node has, shared out to its devices."""
    matmul_efficiency: float
    """What large matrix products reach of `peak_flops`."""
    memory_efficiency: float
    """What elementwise kernels reach of `memory_bandwidth`."""

    def __post_init__(self) -> None:
        for key in ("nodes", "per_node"):
            _check(f"cluster.{key}", getattr(self, key) >= 1, "at least 1", getattr(self, key))
        for key in ("matmul_efficiency", "memory_efficiency"):
            _check(f"cluster.{key}", 0 < getattr(self, key) <= 1, "in (0, 1]", getattr(self, key))
        for key in ("memory_bytes", "memory_bandwidth"):
            _check(f"cluster.{key}", getattr(self, key) > 0, "positive", getattr(self, key))

    @property
    def devices(self) -> int:
        """In all."""
        return self.nodes * self.per_node

    def link(self, ranks: int, stride: int) -> Link:
        """The slowest link among `ranks` that lie `stride` apart, ranks being numbered node by node."""
        return self.inside if ranks * stride <= self.per_node else self.between


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks, and in what portions it works. Mirrors the trainer's own plan of parallelism.

    `sequence_parallel` splits what lies between the products of tensor parallelism over its ranks as well.
    """

    dp: int = 1
    shard: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    zero: Zero = 0
    schedule: Schedule = "1f1b"
    microbatches: int = 1
    """Portions of a rank's batch, one after the other: in the pipeline together, or accumulated without one."""
    stages_per_rank: int = 1
    micro_batch: int = 1
    """Samples of one portion."""
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    sequence_parallel: bool = True
    widened: bool = False
    """Whether 16-bit factors become float32 for the time of a product, as our decoder does on processors that multiply
    float32 faster."""

    def __post_init__(self) -> None:
        for key in (*AXES, "ep", "microbatches", "stages_per_rank", "micro_batch"):
            _check(f"layout.{key}", getattr(self, key) >= 1, "at least 1", getattr(self, key))
        choices = {"zero": Zero, "schedule": Schedule, "recompute": Recompute, "precision": Precision}
        for key, allowed in choices.items():
            options = get_args(allowed)
            _check(f"layout.{key}", getattr(self, key) in options, f"one of {options}", getattr(self, key))
        _check("layout.zero", bool(self.zero) == (self.shard > 1), "0 exactly when shard is 1", self.zero)
        _check("layout.ep", self.dp * self.shard % self.ep == 0, "a divisor of dp x shard", self.ep)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp * self.shard * self.cp * self.tp

    @property
    def global_batch(self) -> int:
        """Samples of one step."""
        return self.dp * self.shard * self.microbatches * self.micro_batch

    def stride(self, axis: str) -> int:
        """How far apart two neighbours along an axis are, in ranks."""
        stride = 1
        for name in reversed(AXES):
            if name == axis:
                return stride
            stride *= getattr(self, name)
        raise KeyError(axis)

    def __str__(self) -> str:
        """The axes above 1, as `dp2 x tp8, ZeRO-1, micro-batch 1 x 16, full recompute`."""
        axes = [f"{name}{getattr(self, name)}" for name in (*AXES, "ep") if getattr(self, name) > 1]
        parts = [" x ".join(axes) or "1 rank"]
        parts += [f"ZeRO-{self.zero}"] if self.zero else []
        if self.pp > 1:
            parts.append(self.schedule + (f" x{self.stages_per_rank}" if self.stages_per_rank > 1 else ""))
        parts.append(f"micro-batch {self.micro_batch} x {self.microbatches}")
        parts += [f"{self.recompute} recompute"] if self.recompute != "none" else []
        return ", ".join(parts)


def _check(key: str, holds: bool, expected: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"planner setting {key!r} must be {expected}, got {value!r}", key=key)
