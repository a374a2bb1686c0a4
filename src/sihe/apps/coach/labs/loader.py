"""Lab `loader.prefetch`: how much of the time training waits for data at each depth, and where a resume goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

_DEPTHS = (0, 1, 2, 4, 8)
_BATCHES = 32
_PERIOD = 8  # every eighth batch is slow: a cold shard, a remote read
_TAKEN = 5
_GLOBAL_BATCH = 8


def stall_share(costs_s: Sequence[float], step_s: float, depth: int) -> float:
    """The share of the time from the first request to the last answer that training waits.

    The reader may begin a batch when fewer than `depth` are ready; the first batch is awaited in any case. With depth 0
    a batch is read when it is asked for.
    """
    asked = read = waited = 0.0
    taken: list[float] = []
    for place, cost_s in enumerate(costs_s):
        room = taken[place - depth] if depth and place >= depth else 0.0
        read = (max(read, room) if depth else asked) + cost_s
        taken.append(max(asked, read))
        waited += taken[-1] - asked
        asked = taken[-1] + step_s
    return waited / taken[-1] if taken[-1] else 0.0


def costs(fast_s: float, slow_s: float) -> list[float]:
    """Seconds of each batch: the last of every `_PERIOD` is slow."""
    return [slow_s if place % _PERIOD == _PERIOD - 1 else fast_s for place in range(_BATCHES)]


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Reads the same costly batches at each depth, and takes a run up again at 1, 2 and 4 ranks."""
    fast_s, slow_s, step_s = (float(parameters[key]) / 1e3 for key in ("fast-ms", "slow-ms", "step-ms"))
    depth = int(parameters["depth"])
    costs_s = costs(fast_s, slow_s)
    (answer,) = run_ranks(
        "sihe.apps.coach.labs.loader_ranks:loading",
        {"depths": list(_DEPTHS), "costs_s": costs_s, "step_s": step_s, "depth": depth, "taken": _TAKEN},
        world_size=1,
        limit_s=limit_s,
        threads=1,
    )
    measured = dict(zip(_DEPTHS, answer["stall_shares"], strict=True))
    modelled = {one: stall_share(costs_s, step_s, one) for one in _DEPTHS}
    mean_s = sum(costs_s) / len(costs_s)
    return Measurement(
        values={
            "none-modelled": modelled[0],
            "none-measured": measured[0],
            "depth-modelled": modelled[depth],
            "depth-measured": measured[depth],
            "one-modelled": modelled[1],
            "deepest-modelled": modelled[max(_DEPTHS)],
            "mean-cost": mean_s * 1e3,
            "bound": max(0.0, 1 - step_s / mean_s),
            "next-sample": answer["next_sample"],
            "read-ahead": answer["read_ahead"],
            "read-ahead-modelled": depth * _GLOBAL_BATCH,
            "batches-differing": sum(answer["differing"]),
            "repeated": answer["repeated"],
            "missed": answer["missed"],
        },
        tables=(_table(measured, modelled),),
        series=(
            _series("measured", Text(zh="实测", en="Measured"), measured, is_measured=True),
            _series("modelled", Text(zh="推算", en="Modelled"), modelled),
        ),
    )


def _table(measured: Mapping[int, float], modelled: Mapping[int, float]) -> Table:
    return Table(
        key="depths",
        title=Text(zh="等数据的时间占比", en="Share of time that training waits for data"),
        columns=(
            Column(label=Text(zh="预取深度", en="Depth")),
            Column(label=Text(zh="实测", en="Measured"), provenance="measured"),
            Column(label=Text(zh="推算", en="Modelled"), provenance="modelled"),
        ),
        rows=tuple((depth, round(share, 4), round(modelled[depth], 4)) for depth, share in measured.items()),
    )


def _series(key: str, label: Text, shares: Mapping[int, float], *, is_measured: bool = False) -> Series:
    return Series(
        key=key,
        chart="stalls",
        label=label,
        x=Axis(label=Text(zh="预取深度", en="Depth")),
        y=Axis(label=Text(zh="等数据的时间占比", en="Share of time waiting")),
        provenance="measured" if is_measured else "modelled",
        points=tuple((float(depth), share) for depth, share in shares.items()),
    )
