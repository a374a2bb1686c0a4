"""Lab `lora.rank`: what an adapter of rank r costs, and how much of a known low-rank update it can learn."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

_ADAPTED = 4  # the query and value matrices of two layers
_STEPS = 250
_RANKS = (1, 2, 4, 8, 16, 32)
# GPT-3 175B: 96 layers of width 12,288 (arXiv 2005.14165, table 2.1).
_GPT3_LAYERS, _GPT3_WIDTH = 96, 12_288


def adapter_parameters(rank: int, inputs: int, outputs: int, matrices: int) -> int:
    """Weights of A [r, inputs] and B [outputs, r] for each of `matrices`: r (d_in + d_out)."""
    return matrices * rank * (inputs + outputs)


def least_error(rank: int, true_rank: int) -> float:
    """The smallest relative Frobenius error of rank `rank` for an update of `true_rank` equal singular values."""
    return math.sqrt(max(0.0, 1 - rank / true_rank))


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Learns the update at ranks below, at and above its own."""
    rank, true_rank, hidden = (int(parameters[key]) for key in ("rank", "true-rank", "hidden"))
    half = true_rank // 2
    tried = sorted({half, true_rank, 2 * true_rank, rank})
    (answer,) = run_ranks(
        "sihe.apps.coach.labs.lora_ranks:ranks",
        {"ranks": tried, "true_rank": true_rank, "hidden": hidden, "steps": _STEPS},
        world_size=1,
        limit_s=limit_s,
        threads=1,
    )
    learnt = {int(one["rank"]): one for one in answer["learnt"]}
    gpt3 = adapter_parameters(4, _GPT3_WIDTH, _GPT3_WIDTH, 2 * _GPT3_LAYERS)
    return Measurement(
        values={
            "parameters-measured": learnt[rank]["parameters"],
            "parameters-modelled": adapter_parameters(rank, hidden, hidden, _ADAPTED),
            "parameters-base": answer["base_parameters"],
            "share": learnt[rank]["parameters"] / answer["base_parameters"],
            "file-bytes": learnt[rank]["file_bytes"],
            "half-error": learnt[half]["error"],
            "half-error-modelled": least_error(half, true_rank),
            "full-error": learnt[true_rank]["error"],
            "double-error": learnt[2 * true_rank]["error"],
            "half-logits": learnt[half]["logit_error"],
            "full-logits": learnt[true_rank]["logit_error"],
            "gpt3-modelled": gpt3 * 2 / 2**20,
            "gpt3-cited": 35.0,
        },
        tables=(_table(learnt, true_rank, hidden),),
        series=(
            _series("learnt", Text(zh="学到的", en="Learnt"), [(r, one["error"]) for r, one in learnt.items()]),
            _series(
                "best",
                Text(zh="最优下界", en="Best possible"),
                [(r, least_error(r, true_rank)) for r in range(1, 2 * max(tried) + 1) if r in {*_RANKS, *tried}],
                is_formula=True,
            ),
        ),
    )


def _table(learnt: Mapping[int, Mapping[str, float]], true_rank: int, hidden: int) -> Table:
    return Table(
        key="ranks",
        title=Text(zh=f"真实的秩是 {true_rank}", en=f"The true rank is {true_rank}"),
        columns=(
            Column(label=Text(zh="适配器的秩", en="Rank of the adapter")),
            Column(label=Text(zh="可训练参数", en="Trainable parameters"), provenance="measured"),
            Column(label=Text(zh="公式", en="Formula"), provenance="modelled"),
            Column(label=Text(zh="文件", en="File"), unit="B", provenance="measured"),
            Column(label=Text(zh="增量误差", en="Error of the update"), provenance="measured"),
            Column(label=Text(zh="下界", en="Lower bound"), provenance="modelled"),
            Column(label=Text(zh="输出误差", en="Error of the logits"), provenance="measured"),
        ),
        rows=tuple(
            (
                rank,
                one["parameters"],
                adapter_parameters(rank, hidden, hidden, _ADAPTED),
                one["file_bytes"],
                round(one["error"], 4),
                round(least_error(rank, true_rank), 4),
                round(one["logit_error"], 4),
            )
            for rank, one in learnt.items()
        ),
    )


def _series(key: str, label: Text, points: list[tuple[int, float]], *, is_formula: bool = False) -> Series:
    return Series(
        key=key,
        chart="error",
        label=label,
        x=Axis(label=Text(zh="适配器的秩", en="Rank of the adapter"), log=True),
        y=Axis(label=Text(zh="增量的相对误差", en="Relative error of the update")),
        provenance="modelled" if is_formula else "measured",
        points=tuple((float(rank), error) for rank, error in points),
    )
