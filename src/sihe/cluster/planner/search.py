"""The fastest layout of a model on a cluster that fits into memory, and why the others lost.

All divisors of the devices are tried for each axis, with these cuts, which lose nothing that could win:

- Tensor parallelism stays inside a node: its messages are exposed, and there are four in every layer.
- Layers are dealt out evenly, so that no stage waits for another.
- A sequence is split only where a rank keeps some thousand tokens; states are sharded over all data ranks or a node's.

Pure: the same question has the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sihe.cluster.planner.errors import NothingFits
from sihe.cluster.planner.step import StepEstimate, estimate_step
from sihe.cluster.planner.types import ClusterSpec, Layout, Precision, Recompute, Schedule, TransformerShape, Zero
from sihe.core.errors import ConfigError

USABLE_MEMORY = 0.92
"""Share of a device's memory that a layout may fill: the rest is the driver's, the allocator's and the messages'."""
_LEAST_SHARE = 4096
"""Tokens of a sequence that context parallelism leaves a rank at least."""
_NEAR = 1.5
"""A layout almost fits when it needs at most this many times the usable memory."""
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Rejected:
    """A layout that lost. `reason` compares it with the winner in one sentence."""

    estimate: StepEstimate
    reason: str


@dataclass(frozen=True)
class Found:
    """The winner, some that came after it, and how many there were."""

    best: StepEstimate
    runners_up: tuple[Rejected, ...]
    considered: int
    too_large: int
    """Of the considered, those that need more memory than there is."""


def search_layouts(
    shape: TransformerShape,
    cluster: ClusterSpec,
    *,
    global_batch: int,
    precision: Precision = "bf16",
    runners_up: int = 5,
    usable: float = USABLE_MEMORY,
) -> Found:
    """The layout with the shortest step over `global_batch` samples. Raises `NothingFits`, and `ConfigError`.

    The runners-up differ from the winner and from each other in the axes or the stage of ZeRO: of those that differ in
    micro-batch or recomputation alone, only the fastest is listed. The last one may be the fastest of those that almost
    fit.
    """
    limit = cluster.memory_bytes * usable
    fastest: dict[tuple[int, ...], StepEstimate] = {}
    estimates = [estimate_step(shape, layout, cluster) for layout in layouts(shape, cluster, global_batch, precision)]
    if not estimates:
        raise ConfigError(
            f"global_batch must leave every device of {cluster.devices} a share in some layout of {shape.name}, "
            f"got {global_batch!r}",
            key="global_batch",
        )
    fitting = [estimate for estimate in estimates if estimate.memory.total <= limit]
    if not fitting:
        smallest = min(estimates, key=lambda estimate: estimate.memory.total)
        raise NothingFits(
            shape.name, cluster.name, needed=smallest.memory.total, limit=limit, smallest=str(smallest.layout)
        )
    for estimate in sorted(fitting, key=lambda estimate: estimate.seconds):
        fastest.setdefault(_axes(estimate.layout), estimate)
    best, *others = fastest.values()
    rejected = [Rejected(estimate, why_slower(estimate, best)) for estimate in others[:runners_up]]
    near = [e for e in estimates if limit < e.memory.total <= _NEAR * limit and e.seconds < best.seconds]
    if near:
        starved = min(near, key=lambda estimate: estimate.seconds)
        gain, needed = 1 - starved.seconds / best.seconds, starved.memory.total / 1e9
        reason = f"{gain:.1%} faster, but needs {needed:.0f} GB where {limit / 1e9:.0f} GB are usable"
        rejected.append(Rejected(starved, reason))
    return Found(best, tuple(rejected), len(estimates), len(estimates) - len(fitting))


def check(shape: TransformerShape, layout: Layout, cluster: ClusterSpec) -> None:
    """Raises `ConfigError` for a layout that cannot cut this model, or needs more devices than there are."""
    rules = {
        "tp": all(size % layout.tp == 0 for size in (shape.heads, shape.kv_heads, shape.ffn)),
        "pp": shape.layers >= layout.pp * layout.stages_per_rank,
        "microbatches": layout.microbatches >= layout.pp,
        "stages_per_rank": layout.pp > 1 or layout.stages_per_rank == 1,
        "cp": shape.sequence % (layout.cp * layout.tp) == 0,
        "ep": layout.ep == 1 or (shape.experts > 0 and shape.experts % layout.ep == 0),
    }
    needs = {
        "tp": f"a divisor of heads, kv_heads and ffn ({shape.heads}, {shape.kv_heads}, {shape.ffn})",
        "pp": f"such that every stage has one of the {shape.layers} layers",
        "microbatches": f"at least pp ({layout.pp})",
        "stages_per_rank": "1 without a pipeline",
        "cp": f"such that cp x tp divides the sequence ({shape.sequence})",
        "ep": f"1, or a divisor of the model's experts ({shape.experts})",
    }
    for key, holds in rules.items():
        if not holds:
            raise ConfigError(f"layout {key!r} must be {needs[key]}, got {getattr(layout, key)!r}", key=f"layout.{key}")
    if layout.world_size > cluster.devices:
        raise ConfigError(
            f"the layout {layout} needs {layout.world_size} devices, and {cluster.name} has {cluster.devices}",
            key="devices",
        )


def why_slower(loser: StepEstimate, winner: StepEstimate) -> str:
    """Where the loser's time goes: the parts of the step that are longer than the winner's, the worst first."""
    theirs = winner.parts()
    apart = ((seconds - theirs[part], part) for part, seconds in loser.parts().items())
    longer = sorted((more for more in apart if more[0] > 0), reverse=True)
    total = loser.seconds - winner.seconds
    if not longer or total <= 1e-3 * winner.seconds:
        return "as fast, to a thousandth"
    told = [f"{part} +{_seconds(more)}" for more, part in longer if more > 0.1 * total][:3]
    return f"{total / winner.seconds:.1%} slower: {', '.join(told)}"


def layouts(shape: TransformerShape, cluster: ClusterSpec, global_batch: int, precision: Precision) -> Iterator[Layout]:
    """Every layout that uses all devices and can be run, whether it fits or not."""
    devices = cluster.devices
    for tp in divisors(min(cluster.per_node, devices)):
        if devices % tp or shape.heads % tp or shape.kv_heads % tp or shape.ffn % tp or shape.sequence % tp:
            continue
        for pp in divisors(devices // tp):
            if shape.layers % pp:
                continue
            for cp in _context_sizes(shape, devices // tp // pp, tp):
                data = devices // tp // pp // cp
                for zero, dp, shard in _data_axes(data, cluster, tp * cp):
                    if pp > 1 and zero == 3:
                        continue  # weights would be gathered again for every micro-batch of every stage
                    axes = Layout(dp=dp, shard=shard, tp=tp, pp=pp, cp=cp, zero=zero, precision=precision)
                    for layout in _with_experts(shape, axes):
                        yield from _portions(shape, layout, global_batch)


def divisors(number: int) -> list[int]:
    """All of them, the smallest first."""
    small = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]


def _context_sizes(shape: TransformerShape, most: int, tp: int) -> list[int]:
    """Splitting short sequences only adds messages."""
    longest = shape.sequence // _LEAST_SHARE
    return [cp for cp in divisors(most) if cp == 1 or (cp <= longest and shape.sequence % (2 * cp * tp) == 0)]


def _data_axes(data: int, cluster: ClusterSpec, stride: int) -> Iterator[tuple[Zero, int, int]]:
    """(stage, replicas, ranks that share out states): all of them, or those of one node (hybrid sharding)."""
    yield 0, data, 1
    zeros: tuple[Zero, ...] = (1, 2, 3)
    node = max(1, cluster.per_node // stride)
    for shard in sorted({data, node} - {1}):
        if data % shard == 0:
            yield from ((zero, data // shard, shard) for zero in zeros)


def _with_experts(shape: TransformerShape, layout: Layout) -> Iterator[Layout]:
    if not shape.experts:
        yield layout
        return
    ranks = layout.dp * layout.shard
    yield from (replace(layout, ep=ep) for ep in divisors(shape.experts) if ranks % ep == 0)


def _portions(shape: TransformerShape, layout: Layout, global_batch: int) -> Iterator[Layout]:
    """Micro-batches, stages and recomputation of given axes."""
    if global_batch % (layout.dp * layout.shard):
        return
    share = global_batch // (layout.dp * layout.shard)
    for micro_batch in _MICRO_BATCHES:
        if share % micro_batch or share // micro_batch < layout.pp:
            continue
        portioned = replace(layout, micro_batch=micro_batch, microbatches=share // micro_batch)
        for schedule, stages in _schedules(shape, portioned):
            for recompute in _RECOMPUTE:
                yield replace(portioned, schedule=schedule, stages_per_rank=stages, recompute=recompute)


def _schedules(shape: TransformerShape, layout: Layout) -> Iterator[tuple[Schedule, int]]:
    yield "1f1b", 1
    if layout.pp == 1 or layout.microbatches % layout.pp:
        return
    most = shape.layers // layout.pp
    yield from (("interleaved-1f1b", stages) for stages in divisors(most)[1:] if stages <= 8)


def _axes(layout: Layout) -> tuple[int, ...]:
    return layout.dp, layout.shard, layout.tp, layout.pp, layout.cp, layout.ep, layout.zero


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
