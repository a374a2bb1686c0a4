"""Lab `accum.equivalence`: one batch over micro-batches and ranks, beside the whole batch and two wrong sums."""

from __future__ import annotations

from collections.abc import Mapping

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

_RANKS = 2
_PARTS = 128


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Computes the gradients of one batch in every way, on two processes."""
    samples, shortness, ones = (int(parameters[key]) for key in ("samples", "shortness", "ones"))
    answers = run_ranks(
        "sihe.apps.coach.labs.accumulation_ranks:equivalence",
        {"samples": samples, "shortness": shortness, "ones": ones, "parts": _PARTS},
        world_size=_RANKS,
        limit_s=limit_s,
    )
    first = answers[0]
    sums = first["gradient_sums"]
    values = {
        "parts-difference": max(error for answer in answers for *_, error, _ in answer["runs"]),
        "loss": first["loss"],
        "loss-spread": max(abs(loss - first["loss"]) for answer in answers for *_, loss in answer["runs"]),
        "means-loss": first["mean_of_means_loss"],
        "means-error": first["mean_of_means_error"],
        "short-weight": first["short_weight"],
        "short-weight-modelled": (shortness + 1) / 2,
        "bf16-ones": first["sums"]["bfloat16"],
        "float32-ones": first["sums"]["float32"],
        "bf16-limit": 2.0**8,
        "bf16-error": sums[-1][1],
        "float32-error": sums[-1][2],
    }
    return Measurement(values=values, tables=(_table(first["runs"], first),), series=_series(sums))


def _table(runs: list[list[float]], whole: Mapping[str, float]) -> Table:
    rows: list[tuple[float | str, ...]] = [
        (f"{ranks} × {steps} × {micro_batch}", error, loss) for ranks, micro_batch, steps, error, loss in runs
    ]
    rows.append(("mean of means / 平均的平均", whole["mean_of_means_error"], whole["mean_of_means_loss"]))
    return Table(
        key="ways",
        title=Text(
            zh="同一个批次的几种算法，与整批一次算完相比",
            en="Ways to compute one batch, beside the whole batch at once",
        ),
        columns=(
            Column(label=Text(zh="进程 × 累积步 × 每步样本", en="Ranks × micro-batches × samples of each")),
            Column(label=Text(zh="梯度的相对误差", en="Relative error of the gradient"), provenance="measured"),
            Column(label=Text(zh="损失", en="Loss"), unit="nat", provenance="measured"),
        ),
        rows=tuple(rows),
    )


def _series(sums: list[tuple[int, float, float]]) -> tuple[Series, ...]:
    x = Axis(label=Text(zh="加在一起的微批次", en="Micro-batches in the sum"), log=True)
    y = Axis(label=Text(zh="累积梯度的相对误差", en="Relative error of the accumulated gradient"), log=True)
    # The first sum in float32 is exact, and a logarithmic axis has no place for 0.
    curves = (("bf16", 1, sums), ("float32", 2, sums[1:]))
    return tuple(
        Series(
            key=key,
            chart="sums",
            label=Text(zh=f"在 {key} 中累积", en=f"summed in {key}"),
            x=x,
            y=y,
            provenance="measured",
            points=tuple((float(row[0]), row[column]) for row in rows),
        )
        for key, column, rows in curves
    )
