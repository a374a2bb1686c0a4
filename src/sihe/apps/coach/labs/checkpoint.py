"""Lab `ckpt.async`: how long training stands still for a checkpoint, what a kill half way leaves, how often to save."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

STATE_BYTES = 12
"""Bytes of a parameter's float32 weight and two float32 moments."""
_KILLS = (0.2, 0.8)  # shares of the bytes
_MB = 1e6
# arXiv 2407.21783, section 3.3.4: 419 unexpected interruptions in 54 days of training on 16,384 GPUs.
_LLAMA_INTERRUPTIONS, _LLAMA_DAYS = 419, 54


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds of work from one checkpoint to the next that lose least: sqrt(2 C M) (Young 1974, Communications of the
    ACM 17(9): "A first order approximation to the optimum checkpoint interval")."""
    return math.sqrt(2 * cost_s * mtbf_s)


def lost_share(interval_s: float, cost_s: float, mtbf_s: float) -> float:
    """The share of time that saving (C / interval) and repeating (half an interval for each failure) take."""
    return cost_s / interval_s + interval_s / (2 * mtbf_s)


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Saves a real state both ways, kills three writers, and puts the costs into the formula."""
    cost_s, mtbf_s = float(parameters["cost-s"]), float(parameters["mtbf-h"]) * 3600
    (answer,) = run_ranks(
        "sihe.apps.coach.labs.checkpoint_ranks:saves",
        {"layers": int(parameters["layers"]), "shares": list(_KILLS)},
        world_size=1,
        limit_s=limit_s,
        threads=1,
    )
    interval_s = best_interval_s(cost_s, mtbf_s)
    stalls = {"foreground": answer["stall_s"], "background": answer["background_stall_s"]}
    return Measurement(
        values={
            "size-measured": answer["size_bytes"] / _MB,
            "size-modelled": STATE_BYTES * answer["parameters"] / _MB,
            "step-after-kill": answer["kills"][0]["step"],
            "kills": len(answer["kills"]),
            "whole-after-kills": sum(kill["is_whole"] for kill in answer["kills"]),
            "left-after-kills": sum(kill["left_bytes"] for kill in answer["kills"]) / _MB,
            "interval": interval_s,
            "lost-share": lost_share(interval_s, cost_s, mtbf_s),
            "lost-share-rare": lost_share(4 * interval_s, cost_s, mtbf_s),
            "lost-share-background": lost_share(best_interval_s(cost_s / 10, mtbf_s), cost_s / 10, mtbf_s),
            "stall-foreground": stalls["foreground"],
            "stall-background": stalls["background"],
            "stall-ratio": stalls["foreground"] / stalls["background"],
            "write-time": answer["write_s"],
            "products": answer["products"],
            "changed-by-training": 0.0 if answer["is_moment_of_save"] else 1.0,
            "llama-mtbf": _LLAMA_DAYS * 24 / _LLAMA_INTERRUPTIONS,
        },
        tables=(_kills_table(answer["kills"]),),
        series=tuple(
            _series(key, label, cost, mtbf_s, interval_s)
            for key, label, cost in (
                ("stated", Text(zh="停顿 C", en="stall C"), cost_s),
                ("tenth", Text(zh="停顿 C/10", en="stall C/10"), cost_s / 10),
            )
        ),
    )


def _kills_table(kills: list[dict[str, float]]) -> Table:
    return Table(
        key="kills",
        title=Text(zh="写第二个存档时被 SIGKILL", en="SIGKILL while the second checkpoint is written"),
        columns=(
            Column(label=Text(zh="写到多少时动手", en="Struck at share")),
            Column(label=Text(zh="没有名字的文件", en="Bytes without a name"), unit="MB", provenance="measured"),
            Column(label=Text(zh="能打开的最新一步", en="Newest step that opens"), provenance="measured"),
            Column(label=Text(zh="逐位一致", en="Whole to the last bit"), provenance="measured"),
            Column(label=Text(zh="打开后残留", en="Left after opening"), unit="MB", provenance="measured"),
        ),
        rows=tuple(
            (
                kill["share"],
                round(kill["staged_bytes"] / _MB, 1),
                kill["step"],
                int(kill["is_whole"]),
                round(kill["left_bytes"] / _MB, 1),
            )
            for kill in kills
        ),
    )


def _series(key: str, label: Text, cost_s: float, mtbf_s: float, interval_s: float) -> Series:
    intervals = [interval_s * 2 ** (power / 2) for power in range(-8, 7)]
    return Series(
        key=key,
        chart="lost",
        label=label,
        x=Axis(label=Text(zh="存档间隔", en="Interval"), unit="s", log=True),
        y=Axis(label=Text(zh="损失的时间占比", en="Share of time lost"), log=True),
        provenance="modelled",
        points=tuple((one, lost_share(one, cost_s, mtbf_s)) for one in intervals),
    )
