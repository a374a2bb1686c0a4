"""How one training run is spread over ranks: one value that checks itself before anything starts.

The ranks form a grid with the axes pp, dp, shard, cp, tp, in this order: the last varies fastest, so that the ranks of
one tensor-parallel group are neighbours, where links are fastest, and pipeline stages are far apart, where little is
sent. `dp`, `shard` and `cp` together are the *data ranks*: each sees other tokens, and gradients are summed over them.
Experts (`ep`) add no axis: they are dealt out to the ranks of dp x shard, which hold the rest of the model in copies.

Pure: no torch, no I/O.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from sihe.core.errors import ConfigError

if TYPE_CHECKING:
    from sihe.models.config import ModelConfig

Zero = Literal[0, 1, 2, 3]
Schedule = Literal["gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv", "dualpipe-v"]
Compression = Literal["none", "bf16", "fp16", "powersgd"]
AXES = ("pp", "dp", "shard", "cp", "tp")
_TWO_STAGES_A_RANK = ("zbv", "dualpipe-v")
"""Each rank owns stage r and stage 2 pp - 1 - r, so the last stage lies where the first one does."""


@dataclass(frozen=True)
class ParallelPlan:
    """The sizes of the axes and what each does. Raises `ConfigError` that names the key."""

    dp: int = 1
    """Replicas of the model that share the batch."""
    shard: int = 1
    """Ranks that share out one replica's states (ZeRO), and the batch as well."""
    tp: int = 1
    """Ranks that share out each layer's matrices; between the products the sequence is split over them too."""
    pp: int = 1
    """Ranks that share out the layers."""
    cp: int = 1
    """Ranks that share out each sequence."""
    ep: int = 1
    """Ranks that share out the experts of each mixture; divides dp x shard."""
    zero: Zero = 0
    """What is sharded over `shard`: nothing, optimizer states (1), and gradients (2), and weights (3)."""
    schedule: Schedule = "1f1b"
    """Order of the micro-batches in the pipeline."""
    microbatches: int = 1
    """Parts of a rank's batch that are in the pipeline together; at least `pp`."""
    stages_per_rank: int = 1
    """Pieces of the model that one pipeline rank owns (virtual stages)."""
    compression: Compression = "none"
    """Of the gradients on their way between replicas."""
    powersgd_rank: int = 4

    def __post_init__(self) -> None:
        for name in ("dp", "shard", "tp", "pp", "cp", "ep", "microbatches", "stages_per_rank", "powersgd_rank"):
            value = getattr(self, name)
            _check(name, type(value) is int and value >= 1, "a whole number, at least 1", value)
        _check("zero", self.zero in get_args(Zero), "0, 1, 2 or 3", self.zero)
        _check("schedule", self.schedule in get_args(Schedule), " or ".join(get_args(Schedule)), self.schedule)
        _check(
            "compression",
            self.compression in get_args(Compression),
            " or ".join(get_args(Compression)),
            self.compression,
        )
        _check("zero", not (self.zero and self.shard == 1), "0 while shard is 1: nothing to share out", self.zero)
        _check(
            "shard", not (self.shard > 1 and not self.zero), "1 while zero is 0: replicas are counted by dp", self.shard
        )
        _check(
            "ep", (self.dp * self.shard) % self.ep == 0, f"a divisor of dp x shard ({self.dp * self.shard})", self.ep
        )
        _check(
            "compression",
            self.compression == "none" or self.zero == 0,
            "none with ZeRO: it shards the sum",
            self.compression,
        )
        self._check_pipeline()

    def _check_pipeline(self) -> None:
        if self.pp == 1:
            _check("stages_per_rank", self.stages_per_rank == 1, "1 without a pipeline (pp = 1)", self.stages_per_rank)
            _check(
                "microbatches",
                self.microbatches == 1,
                "1 without a pipeline: set micro_batch instead",
                self.microbatches,
            )
            return
        _check(
            "microbatches",
            self.microbatches >= self.pp,
            f"at least pp ({self.pp}): fewer leave stages idle",
            self.microbatches,
        )
        if self.schedule in _TWO_STAGES_A_RANK:
            _check("stages_per_rank", self.stages_per_rank == 2, f"2 with {self.schedule}", self.stages_per_rank)
        elif self.schedule.startswith("interleaved"):
            _check(
                "stages_per_rank", self.stages_per_rank >= 2, f"at least 2 with {self.schedule}", self.stages_per_rank
            )
            _check(
                "microbatches",
                self.microbatches % self.pp == 0,
                f"a multiple of pp ({self.pp}) with {self.schedule}",
                self.microbatches,
            )
        else:
            _check("stages_per_rank", self.stages_per_rank == 1, f"1 with {self.schedule}", self.stages_per_rank)
        if self.schedule == "dualpipe-v":
            _check(
                "microbatches",
                self.microbatches >= 2 * self.pp,
                f"at least 2 pp ({2 * self.pp}) with dualpipe-v",
                self.microbatches,
            )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp * self.shard * self.cp * self.tp

    @property
    def batch_ranks(self) -> int:
        """Ranks between which the samples of a batch are shared out."""
        return self.dp * self.shard

    @property
    def num_stages(self) -> int:
        """Pieces that the layers are cut into."""
        return self.pp * self.stages_per_rank

    def check_model(self, model: ModelConfig) -> None:
        """Raises `ConfigError` for a model that this plan cannot cut."""
        if self.tp > 1:
            for name in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
                size = getattr(model, name)
                _check("tp", size % self.tp == 0, f"a divisor of the model's {name} ({size})", self.tp)
            plain = model.attention.latent is None and not model.attention.out_bias and model.layers.gated
            _check("tp", plain, "1 for latent attention and for layers with biases, which are not cut", self.tp)
        if self.cp > 1:
            plain = model.attention.window is None and model.positions.kind not in ("relative", "alibi")
            _check(
                "cp", plain, "1 for windows and for positions that act on scores: attention is plain causal", self.cp
            )
        _check(
            "pp",
            model.num_layers >= self.num_stages,
            f"such that pp x stages_per_rank is at most num_layers ({model.num_layers})",
            self.pp,
        )
        if self.ep > 1:
            experts = model.num_experts
            _check("ep", experts > 0, "1 for a model without experts", self.ep)
            _check("ep", experts % self.ep == 0, f"a divisor of the model's num_experts ({experts})", self.ep)

    def check_batch(self, *, global_batch: int, micro_batch: int, sequence_length: int) -> None:
        """Raises `ConfigError` for a batch that does not divide: samples a step, samples at once, tokens a sample."""
        share = self.batch_ranks * micro_batch * self.microbatches
        if global_batch % share:
            raise ConfigError(
                "training setting 'global_batch' must be a multiple of micro_batch x (dp x shard) x microbatches "
                f"({micro_batch} x {self.batch_ranks} x {self.microbatches}), got {global_batch!r}",
                key="global_batch",
            )
        if self.cp > 1:
            parts = 2 * self.cp
            _check(
                "cp",
                sequence_length % parts == 0,
                f"such that 2 cp ({parts}) divides sequence_length ({sequence_length})",
                self.cp,
            )
        if self.tp > 1:
            local = sequence_length // self.cp
            _check("tp", local % self.tp == 0, f"a divisor of a rank's share of the sequence ({local} tokens)", self.tp)

    def with_data_ranks(self, ranks: int) -> ParallelPlan:
        """This plan on another number of batch ranks, as an elastic run has after losing or gaining some.

        The ranks go to `shard` where states are sharded over all of them, else to `dp`. Raises `ConfigError`.
        """
        values = asdict(self)
        if self.zero and self.dp == 1:
            values |= {"shard": ranks, "zero": self.zero if ranks > 1 else 0}
        else:
            _check("shard", ranks % self.shard == 0, f"a divisor of the number of batch ranks ({ranks})", self.shard)
            values |= {"dp": ranks // self.shard}
        return ParallelPlan(**values)

    def __str__(self) -> str:
        """The axes larger than 1, as `dp2 x tp2, ZeRO-3`; `1 rank` for none."""
        axes = [f"{name}{getattr(self, name)}" for name in (*AXES, "ep") if getattr(self, name) > 1]
        extra = [f"ZeRO-{self.zero}"] if self.zero else []
        extra += [self.schedule] if self.pp > 1 else []
        extra += [self.compression] if self.compression != "none" else []
        return ", ".join([" x ".join(axes) or "1 rank", *extra])


def _check(key: str, holds: bool, expected: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"parallel setting {key!r} must be {expected}, got {value!r}", key=f"parallel.{key}")
