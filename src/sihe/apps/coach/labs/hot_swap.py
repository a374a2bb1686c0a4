"""Lab `serve.hot_swap`: a model is exchanged under load, beside the old one and by stopping it: who pays, and what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

WAYS = ("beside", "drained", "stopped")
_WIDTH, _TOKENS = 768, 32
_CALM_S, _BETWEEN_S = 2.0, 0.7
_LABELS = {
    "beside": Text(zh="在旁边加载，再切换", en="Loaded beside, then flipped"),
    "drained": Text(zh="答完再停，加载，启动", en="Stopped after its answers, loaded, started"),
    "stopped": Text(zh="立刻停，加载，启动", en="Stopped at once, loaded, started"),
}
_MB = 1e6


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Exchanges two versions `swaps` times in each way, at `rate` requests a second or half of what can be answered."""
    swaps, layers, rate = int(parameters["swaps"]), int(parameters["layers"]), float(parameters["rate"])
    (found,) = run_ranks(
        "sihe.apps.coach.labs.hot_swap_ranks:swap",
        {
            "swaps": swaps,
            "rate_per_s": rate,
            "layers": layers,
            "width": _WIDTH,
            "tokens": _TOKENS,
            "calm_s": _CALM_S,
            "between_s": _BETWEEN_S,
        },
        world_size=1,
        limit_s=limit_s,
        threads=1,
    )
    ways, one, extra = found["ways"], found["one_bytes"], found["extra_bytes"]
    beside = ways["beside"]
    return Measurement(
        values={
            "sent": beside["sent"],
            "failed": failed(beside),
            "versions": beside["most_versions"],
            "wrong": beside["wrong"],
            "drained-failed": failed(ways["drained"]),
            "stopped-failed": failed(ways["stopped"]),
            "stopped-cut": ways["stopped"]["cut"],
            "stopped-refused": ways["stopped"]["refused"],
            "capacity": found["capacity_per_s"],
            "rate": found["rate_per_s"],
            "refused-modelled": found["rate_per_s"] * ways["stopped"]["away_s"],
            **{f"{way}-first": ways[way]["first_s"] * 1e3 for way in WAYS},
            "wait-calm": beside["calm_wait_s"] * 1e3,
            "wait-met": beside["met_wait_s"] * 1e3,
            "weights": found["weight_bytes"] / _MB,
            "memory-one": one / _MB,
            "memory-ratio": (one + extra["beside"]) / one,
            "memory-ratio-stopped": (one + extra["stopped"]) / one,
        },
        tables=(_table(ways, extra),),
        series=tuple(_series(way, ways[way]["rate"]) for way in WAYS),
    )


def failed(way: Mapping[str, Any]) -> int:
    """Requests that were refused, or whose answer was cut."""
    return int(way["refused"] + way["cut"])


def _table(ways: Mapping[str, Mapping[str, Any]], extra: Mapping[str, int]) -> Table:
    return Table(
        key="ways",
        title=Text(zh="三种换法", en="Three ways of changing the model"),
        columns=(
            Column(label=Text(zh="换法", en="Way")),
            Column(label=Text(zh="发出", en="Sent"), provenance="measured"),
            Column(label=Text(zh="答完", en="Completed"), provenance="measured"),
            Column(label=Text(zh="被拒", en="Refused"), provenance="measured"),
            Column(label=Text(zh="被截断", en="Cut off"), provenance="measured"),
            Column(label=Text(zh="一条回答里的版本", en="Versions in one answer"), provenance="measured"),
            Column(
                label=Text(zh="下令到新版本首词元，中位数", en="Order to first new token, median"),
                unit="ms",
                provenance="measured",
            ),
            Column(
                label=Text(zh="多占的内存，峰值", en="Memory above one version, peak"), unit="MB", provenance="measured"
            ),
        ),
        rows=tuple(
            (
                way,
                found["sent"],
                found["completed"],
                found["refused"],
                found["cut"],
                found["most_versions"],
                round(found["first_s"] * 1e3),
                round(extra[way] / _MB, 1),
            )
            for way, found in ways.items()
        ),
    )


def _series(way: str, rate: list[list[float]]) -> Series:
    return Series(
        key=way,
        chart="tokens",
        label=_LABELS[way],
        x=Axis(label=Text(zh="距第一次下令", en="From the first order"), unit="s"),
        y=Axis(label=Text(zh="收到的词元", en="Tokens received"), unit="tok/s"),
        provenance="measured",
        points=tuple((time_s, tokens) for time_s, tokens in rate),
    )
