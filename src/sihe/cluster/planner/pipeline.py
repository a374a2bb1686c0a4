"""The pipeline: which layers its ranks have, their idle time, and how much they have begun and not finished.

    p  ranks      v  stages of one      m  micro-batches      r  this rank      L  layers

What is said of schedules is what the trainer's order, torch's, does; a test holds it against that order.
"""

from __future__ import annotations

from functools import lru_cache

from sihe.cluster.planner.types import Layout, TransformerShape

_V_SCHEDULES = ("zbv", "dualpipe-v")
"""Stages go down the ranks and up again: rank r has the stages r and 2 p - 1 - r."""


def bubble(layout: Layout) -> float:
    """Idle share of a rank's time, of stages that all take equally long, forward one part and backward two.

    (p - 1) / (v m + p - 1) (Narayanan et al. 2021, arXiv 2104.04473, section 2.2, which counts it relative to the busy
    time). Zero-bubble schedules put the gradients of weights, a third of the work, where ranks would wait: a third of
    the idle time is left, (p - 1) / (3 v m + p - 1), as in ZB-H1 (Qi et al. 2023, arXiv 2401.10241, table 2). ZB-V is
    published without any (arXiv 2405.15362), but torch's orders of ZB-V and of DualPipe-V leave that third, and that of
    ZB-V with fewer than 3/2 p micro-batches up to twice as much.
    """
    if layout.pp == 1:
        return 0.0
    idle, busy = float(layout.pp - 1), float(layout.stages_per_rank * layout.microbatches)
    if layout.schedule == "zbv":
        idle = max(idle, 2 * idle - 2 * (layout.microbatches - layout.pp)) / 3
    elif layout.schedule in ("interleaved-zero-bubble", "dualpipe-v"):
        idle /= 3
    return idle / (busy + idle)


def in_flight(layout: Layout, rank: int = 0) -> float:
    """Micro-batches' worth of a rank's own layers of which it keeps activations at most."""
    return sum(begun(layout, rank)) / layout.stages_per_rank


def begun(layout: Layout, rank: int) -> tuple[int, ...]:
    """Of each of a rank's stages, the micro-batches that it has begun and not finished when it has most of them.

    GPipe begins all; 1F1B p - r; interleaving (v - 1) p + 2 (p - r) - 1 in all stages, which on the first rank is
    1 + (p - 1) / (p v) times that of 1F1B (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.3). Interleaved zero
    bubble begins v p; ZB-V 2 p, as much as 1F1B (arXiv 2405.15362), or m + r + 1 where there are few micro-batches;
    DualPipe-V one more. A micro-batch is finished when the gradients of weights are there.
    """
    ranks, stages, most = layout.pp, layout.stages_per_rank, layout.microbatches
    if ranks == 1:
        return (1,)
    match layout.schedule:
        case "gpipe":
            return (most,)
        case "1f1b":
            return (min(most, ranks - rank),)
        case "interleaved-1f1b":
            total = (stages - 1) * ranks + 2 * (ranks - rank) - 1
        case "interleaved-zero-bubble":
            total = stages * ranks
        case "zbv":
            total = min(2 * ranks, most + rank + 1)
        case "dualpipe-v":
            total = 2 * ranks + 1
    total = min(total, stages * most)
    if layout.schedule in _V_SCHEDULES:
        return total - total // 2, total // 2
    # Micro-batches come in rounds of p, each round through all stages of a rank before the next.
    whole, rest = divmod(total, stages * ranks)
    return tuple(whole * ranks + min(ranks, max(0, rest - stage * ranks)) for stage in range(stages))


def stages_of_rank(layout: Layout, rank: int) -> tuple[int, ...]:
    """The stages that a pipeline rank has, in the order of the layers."""
    stages = layout.pp * layout.stages_per_rank
    if layout.schedule in _V_SCHEDULES and layout.pp > 1:
        return rank, stages - 1 - rank
    return tuple(range(rank, stages, layout.pp))


def layers_of_stages(shape: TransformerShape, layout: Layout) -> tuple[int, ...]:
    """How many layers each stage has.

    `gpt`: as even as can be, the first ones more. `llama`: as the trainer cuts, such that the most costly stage costs
    as little as can be, a token costing its weights and the head's on the last stage; of equal cuts, the one whose
    stages differ least. O(L).
    """
    return _cut(shape, layout.pp * layout.stages_per_rank)


@lru_cache(maxsize=1024)
def _cut(shape: TransformerShape, stages: int) -> tuple[int, ...]:
    if shape.family == "gpt":
        return tuple(-(-(shape.layers - stage) // stages) for stage in range(stages))
    if stages == 1:
        return (shape.layers,)
    layer, head = shape.layer_parameters, shape.vocab * shape.hidden
    best: tuple[int, int, list[int]] | None = None
    for last in range(1, shape.layers - stages + 2):
        each, more = divmod(shape.layers - last, stages - 1)
        cut = [each] * (stages - 1 - more) + [each + 1] * more
        costs = [*(layers * layer for layers in cut), last * layer + head]
        found = max(costs), sum(cost * cost for cost in costs), [*cut, last]
        best = found if best is None else min(best, found)
    assert best is not None, "there are as many layers as stages"
    return tuple(best[2])
