"""Lab `pipeline.bubble`: the share of time that pipeline ranks wait, by schedule: simulated, on real ranks, by formula.

Idle time is counted in slots, not in seconds: the order in which two real ranks did their work is replayed with a
forward pass that takes one slot and a backward pass that takes two. A busy machine changes seconds, but no order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Bar, Column, Measurement, Table, Timeline, WorkKind
from sihe.apps.coach.schema import Text
from sihe.cluster.planner.pipeline import bubble
from sihe.cluster.planner.types import Layout
from sihe.core.errors import InternalError

_SLOTS = {"F": 1, "B": 2, "I": 1, "W": 1}
_REAL_RANKS = 2
_KINDS = (
    WorkKind(key="forward", label=Text(zh="前向", en="forward")),
    WorkKind(key="backward", label=Text(zh="反向", en="backward")),
    WorkKind(key="input", label=Text(zh="反向：对输入", en="backward, for the input")),
    WorkKind(key="weight", label=Text(zh="反向：对权重", en="backward, for the weights")),
)
_KIND_OF = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}


@dataclass(frozen=True)
class Slot:
    """One piece of work of a replay: who did it, what it was, and from which slot to which."""

    rank: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Simulates the schedules on `ranks` ranks, and runs them on two processes."""
    ranks, micro, pieces = (int(parameters[key]) for key in ("ranks", "microbatches", "stages-per-rank"))
    plans = _plans(pieces)
    answers = run_ranks(
        "sihe.apps.coach.labs.pipeline_ranks:schedules",
        {
            "plans": [plan | {"pp": _REAL_RANKS, "microbatches": micro} for plan in plans.values()],
            "outlines": [plan | {"pp": ranks, "microbatches": micro} for plan in plans.values()],
        },
        world_size=_REAL_RANKS,
        limit_s=limit_s,
    )
    values = {"loss-difference": max(run["loss_difference"] for answer in answers for run in answer["runs"])}
    rows, simulated, timed = [], {}, {}
    for index, (name, plan) in enumerate(plans.items()):
        simulated[name] = [Slot(*span) for span in answers[0]["simulated"][index]]
        seen = [answer["runs"][index]["seen"] for answer in answers]
        counted = replay([[tuple(work[:3]) for work in done] for done in seen])
        timed[name] = in_seconds(seen)
        stages = int(plan["stages_per_rank"])
        formulas = [bubble_share(size, micro, stages, str(plan["schedule"])) for size in (ranks, _REAL_RANKS)]
        values |= {
            f"{name}-simulated": idle_share(simulated[name]),
            f"{name}-formula": formulas[0],
            f"{name}-counted": idle_share(counted),
            f"{name}-formula-two": formulas[1],
            f"{name}-timed": idle_share(timed[name]),
            f"{name}-kept": most_begun(counted, rank=0) / stages,
        }
        columns = ("simulated", "formula", "counted", "formula-two", "timed", "kept")
        rows.append((f"{plan['schedule']}, v = {stages}", *(round(values[f"{name}-{key}"], 4) for key in columns)))
    values["wait-of-one-batch"] = bubble_share(ranks, 1, 1)
    pictures = [
        _timeline(simulated["onefb"], "simulated-1f1b", _title("1F1B", ranks, micro, "模拟", "simulated")),
        _timeline(
            simulated["interleaved"],
            "simulated-interleaved",
            _title(f"interleaved 1F1B, v = {pieces}", ranks, micro, "模拟", "simulated"),
        ),
        _timeline(simulated["zbv"], "simulated-zbv", _title("ZB-V", ranks, micro, "模拟", "simulated")),
        _timeline(
            timed["onefb"], "timed-1f1b", _title("1F1B", _REAL_RANKS, micro, "真实计时", "as timed"), is_real=True
        ),
    ]
    return Measurement(values=values, tables=(_table(rows, ranks),), timelines=tuple(pictures))


def _plans(pieces: int) -> dict[str, dict[str, Any]]:
    """Schedule and stages of a rank, by the name that the claims have."""
    return {
        "gpipe": {"schedule": "gpipe", "stages_per_rank": 1},
        "onefb": {"schedule": "1f1b", "stages_per_rank": 1},
        "interleaved": {"schedule": "interleaved-1f1b", "stages_per_rank": pieces},
        "zbv": {"schedule": "zbv", "stages_per_rank": 2},
    }


def bubble_share(ranks: int, microbatches: int, pieces: int, schedule: str = "1f1b") -> float:
    """Idle share of a rank's time by the papers' formulas: (p - 1) / (v m + p - 1), and 0 for ZB-V."""
    if schedule == "zbv":
        return 0.0  # arXiv 2405.15362; the planner counts what torch's order of it leaves
    layout = {"pp": ranks, "microbatches": microbatches, "stages_per_rank": pieces, "schedule": schedule}
    return bubble(Layout(**layout))  # type: ignore[arg-type]  # the schedule is one of the planner's


def replay(done: Sequence[Sequence[tuple[str, int, int]]]) -> list[Slot]:
    """Slots of work (kind, stage, micro-batch) done by each rank in this order, each as early as its needs allow.

    A forward pass needs that of the stage before; a backward pass the forward pass of its stage and the gradients from
    the stage behind. Raises `InternalError` for an order that no ranks can have had.
    """
    last_stage = max(stage for works in done for _, stage, _ in works)
    ends: dict[tuple[str, int, int], int] = {}
    slots: list[Slot] = []
    next_work, free = [0] * len(done), [0] * len(done)
    while any(place < len(works) for place, works in zip(next_work, done, strict=True)):
        before = len(slots)
        for rank, works in enumerate(done):
            while next_work[rank] < len(works):
                kind, stage, micro = works[next_work[rank]]
                needs = [ends.get(need) for need in _needs(kind, stage, micro, last_stage)]
                if any(need is None for need in needs):
                    break
                start = max([free[rank], *(need for need in needs if need is not None)])
                free[rank] = ends["F" if kind == "F" else kind.replace("I", "B"), stage, micro] = start + _SLOTS[kind]
                slots.append(Slot(rank, kind, stage, micro, start, free[rank]))
                next_work[rank] += 1
        if len(slots) == before:
            raise InternalError(f"ranks wait for each other at {next_work}: this order cannot have been")
    return slots


def _needs(kind: str, stage: int, micro: int, last_stage: int) -> list[tuple[str, int, int]]:
    if kind == "F":
        return [("F", stage - 1, micro)] if stage else []
    if kind == "W":
        return [("B", stage, micro)]
    behind = [("B", stage + 1, micro)] if stage < last_stage else []
    return [("F", stage, micro), *behind]


def in_seconds(seen: Sequence[Sequence[Sequence[Any]]]) -> list[Slot]:
    """What ranks wrote down, in milliseconds from the first start."""
    first = min(work[3] for works in seen for work in works)
    return [
        Slot(rank, kind, stage, micro, (start - first) * 1e3, (end - first) * 1e3)
        for rank, works in enumerate(seen)
        for kind, stage, micro, start, end in works
    ]


def idle_share(slots: Iterable[Slot]) -> float:
    """The share of all ranks' time, from the first start to the last end, in which they wait."""
    slots = list(slots)
    length = max(slot.end for slot in slots) - min(slot.start for slot in slots)
    return 1 - sum(slot.end - slot.start for slot in slots) / (length * len({slot.rank for slot in slots}))


def most_begun(slots: Iterable[Slot], *, rank: int) -> int:
    """The most forward passes whose backward pass is not done, of one rank: activations that it keeps."""
    begun = most = 0
    for slot in sorted((slot for slot in slots if slot.rank == rank), key=lambda slot: slot.end):
        begun += {"F": 1, "I": 0}.get(slot.kind, -1)
        most = max(most, begun)
    return most


def _title(schedule: str, ranks: int, microbatches: int, how_zh: str, how_en: str) -> Text:
    return Text(
        zh=f"{schedule}，p = {ranks}，m = {microbatches}（{how_zh}）",
        en=f"{schedule}, p = {ranks}, m = {microbatches} ({how_en})",
    )


def _timeline(slots: list[Slot], key: str, title: Text, *, is_real: bool = False) -> Timeline:
    ranks = 1 + max(slot.rank for slot in slots)
    kinds = {_KIND_OF[slot.kind] for slot in slots}
    return Timeline(
        key=key,
        title=title,
        unit=Text(zh="毫秒", en="ms") if is_real else Text(zh="格", en="slots"),
        provenance="measured" if is_real else "modelled",
        rows=tuple(Text(zh=f"进程 {rank}", en=f"rank {rank}") for rank in range(ranks)),
        kinds=tuple(kind for kind in _KINDS if kind.key in kinds),
        bars=tuple(
            Bar(row=slot.rank, start=slot.start, end=slot.end, kind=_KIND_OF[slot.kind], mark=str(slot.microbatch))
            for slot in slots
        ),
    )


def _table(rows: list[tuple[float | str, ...]], ranks: int) -> Table:
    two = f"p = {_REAL_RANKS}"
    return Table(
        key="schedules",
        title=Text(zh="各调度的空闲占比", en="Idle share by schedule"),
        columns=(
            Column(label=Text(zh="调度", en="Schedule")),
            Column(label=Text(zh=f"模拟，p = {ranks}", en=f"Simulated, p = {ranks}"), provenance="modelled"),
            Column(label=Text(zh=f"公式，p = {ranks}", en=f"Formula, p = {ranks}"), provenance="modelled"),
            Column(label=Text(zh=f"真实进程按格计数，{two}", en=f"Real ranks, counted, {two}"), provenance="measured"),
            Column(label=Text(zh=f"公式，{two}", en=f"Formula, {two}"), provenance="modelled"),
            Column(label=Text(zh=f"真实进程计时，{two}", en=f"Real ranks, timed, {two}"), provenance="measured"),
            Column(label=Text(zh="留着激活的微批次", en="Micro-batches kept"), provenance="measured"),
        ),
        rows=tuple(rows),
    )
