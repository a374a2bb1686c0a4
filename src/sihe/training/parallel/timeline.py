"""What each pipeline rank does when, for a picture of a schedule and for its bubble: pure, nothing runs.

The orders are those that torch executes. The times come from a simulation in which a rank does its work in order, each
as soon as what it needs is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from sihe.core.errors import InternalError
from sihe.training.parallel.stage import rank_of_stage

if TYPE_CHECKING:
    from sihe.training.parallel.plan import ParallelPlan

Kind = Literal["F", "B", "I", "W"]
"""Forward, backward, and the two parts of backward: for the stage's input and for its weights."""


@dataclass(frozen=True)
class Work:
    """One micro-batch in one stage."""

    kind: Kind
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Span:
    """When a rank does a piece of work, in the unit of the times that were given."""

    rank: int
    work: Work
    start: float
    end: float


@dataclass(frozen=True)
class StageTimes:
    """What one micro-batch takes in one stage; a whole backward pass takes `input` + `weight`."""

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    message: float = 0.0
    """From a stage on one rank to the next on another."""

    def of(self, kind: Kind) -> float:
        """The time of one piece of work."""
        return {"F": self.forward, "I": self.input, "W": self.weight, "B": self.input + self.weight}[kind]


def order(plan: ParallelPlan) -> list[list[Work]]:
    """What each pipeline rank does, one after the other."""
    match plan.schedule:
        case "gpipe":
            return [_gpipe(plan, rank) for rank in range(plan.pp)]
        case "1f1b":
            return [_one_forward_one_backward(plan, rank) for rank in range(plan.pp)]
        case _:
            return [list(_flat(actions)) for _, actions in sorted(_torch_order(plan).items())]


def timeline(plan: ParallelPlan, times: StageTimes | None = None) -> list[Span]:
    """When each rank does what, from 0, by end."""
    times = times or StageTimes()
    waiting = [iter(works) for works in order(plan)]
    heads = [next(works, None) for works in waiting]
    free = [0.0] * plan.pp
    done: dict[Work, float] = {}
    spans: list[Span] = []
    while any(heads):
        went_on = False
        for rank, head in enumerate(heads):
            needs = [] if head is None else list(_needs(head, plan))
            if head is None or any(all(work not in done for work in either) for either in needs):
                continue
            arrivals = [_arrival(either, rank, done, plan, times) for either in needs]
            start = max([free[rank], *arrivals])
            free[rank] = done[head] = start + times.of(head.kind)
            spans.append(Span(rank, head, start, free[rank]))
            heads[rank] = next(waiting[rank], None)
            went_on = True
        if not went_on:
            raise InternalError(f"the schedule {plan.schedule} waits for itself at {heads}")
    return sorted(spans, key=lambda span: (span.end, span.rank))


def bubble(spans: Iterable[Span]) -> float:
    """The share of all ranks' time, from the first start to the last end, in which they wait: 0 .. 1."""
    spans = list(spans)
    ranks = len({span.rank for span in spans})
    length = max(span.end for span in spans) - min(span.start for span in spans)
    return 1.0 - sum(span.end - span.start for span in spans) / (ranks * length)


def _needs(work: Work, plan: ParallelPlan) -> Iterator[tuple[Work, ...]]:
    """What must be done before; of each tuple one."""
    stage, micro = work.stage, work.microbatch
    if work.kind == "F" and stage > 0:
        yield (Work("F", stage - 1, micro),)
    if work.kind in ("B", "I"):
        yield (Work("F", stage, micro),)
        if stage < plan.num_stages - 1:
            yield Work("B", stage + 1, micro), Work("I", stage + 1, micro)
    if work.kind == "W":
        yield (Work("I", stage, micro),)


def _arrival(
    either: tuple[Work, ...], rank: int, done: dict[Work, float], plan: ParallelPlan, times: StageTimes
) -> float:
    work = next(work for work in either if work in done)
    return done[work] + (times.message if rank_of_stage(plan, work.stage) != rank else 0.0)


def _gpipe(plan: ParallelPlan, rank: int) -> list[Work]:
    """All forward, then all backward (Huang et al. 2019, arXiv 1811.06965, section 2.3)."""
    return [Work(kind, rank, micro) for kind in ("F", "B") for micro in range(plan.microbatches)]


def _one_forward_one_backward(plan: ParallelPlan, rank: int) -> list[Work]:
    """As many forward as there are stages from here on, then backward and forward in turns.

    Narayanan et al. 2021, arXiv 2104.04473, section 2.2.1.
    """
    ahead = min(plan.pp - rank, plan.microbatches)
    works = [Work("F", rank, micro) for micro in range(ahead)]
    for micro in range(plan.microbatches):
        works.append(Work("B", rank, micro))
        if micro + ahead < plan.microbatches:
            works.append(Work("F", rank, micro + ahead))
    return works


class _StageInOutline(nn.Module):
    """As much of torch's stage as its schedules read to find their order."""

    def __init__(self, plan: ParallelPlan, index: int) -> None:
        super().__init__()
        self.submod = self
        self.stage_index = index
        self.num_stages = plan.num_stages
        self.group_size = plan.pp
        self.group_rank = 0
        self.stage_index_to_group_rank: dict[int, int] = {}


def _torch_order(plan: ParallelPlan) -> dict[int, list[Any]]:
    from sihe.training.parallel.pipeline import MULTI

    stages: Any = [_StageInOutline(plan, index) for index in range(plan.stages_per_rank)]
    return MULTI[plan.schedule](stages, plan.microbatches).pipeline_order


def _flat(actions: Iterable[Any]) -> Iterator[Work]:
    """Torch's actions without its pauses; a pair that it overlaps, one after the other."""
    for action in actions:
        if action is None:
            continue
        if action.sub_actions is not None:
            yield from _flat(action.sub_actions)
        else:
            yield Work(action.computation_type.value, action.stage_index, action.microbatch_index)
