"""Lab `amp.scale`: which gradients float16 loses at which loss scale, where it overflows, and a scale that adapts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sihe.apps.coach.errors import LabFailed
from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

_EXPONENTS = list(range(0, 33, 4))


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Runs the backward passes and the training in one process."""
    answer = run_ranks(
        "sihe.apps.coach.labs.loss_scale_ranks:scales",
        {
            "exponents": _EXPONENTS,
            "batch_tokens": 2 ** int(parameters["batch-exponent"]),
            "steps": int(parameters["steps"]),
            "growth": int(parameters["growth"]),
        },
        world_size=1,
        limit_s=limit_s,
    )[0]
    scales, trace = answer["scales"], answer["trace"]
    finite = [index for index, scale in enumerate(scales) if scale["finite"]]
    if not finite:
        raise LabFailed("float16 overflowed at every scale: take a larger batch")
    best = min(finite, key=lambda index: scales[index]["error"])
    values = {
        "vanished-unscaled": scales[0]["vanished"],
        "error-unscaled": scales[0]["error"],
        "largest-exponent": _EXPONENTS[finite[-1]],
        "error-best": scales[best]["error"],
        "vanished-best": scales[best]["vanished"],
        "smallest-exponent": -24.0,
        "paper-factor": 8.0,
        "overflows": sum(row[2] for row in trace),
        "settled-exponent": max(row[1] for row in trace),
        "loss-first": trace[0][3],
        "loss-last": trace[-1][3],
    }
    return Measurement(values=values, tables=(_table(scales),), series=_series(scales, trace))


def _table(scales: list[Mapping[str, Any]]) -> Table:
    return Table(
        key="scales",
        title=Text(zh="各个放大倍数下的 fp16 梯度", en="Gradients in fp16 by loss scale"),
        columns=(
            Column(label=Text(zh="放大 2^k，k", en="Scale 2^k, k")),
            Column(label=Text(zh="变成 0 的梯度占比", en="Share that became 0"), provenance="measured"),
            Column(label=Text(zh="梯度的相对误差", en="Relative error"), provenance="measured"),
            Column(label=Text(zh="溢出", en="Overflow")),
        ),
        rows=tuple(
            (exponent, scale["vanished"], scale["error"], "-" if scale["finite"] else "inf / nan")
            for exponent, scale in zip(_EXPONENTS, scales, strict=True)
        ),
    )


def _series(scales: list[Mapping[str, Any]], trace: list[tuple[int, float, int, float]]) -> tuple[Series, ...]:
    x = Axis(label=Text(zh="放大 2^k，k", en="Scale 2^k, k"))
    fit = [(float(k), scale) for k, scale in zip(_EXPONENTS, scales, strict=True) if scale["finite"]]
    return (
        Series(
            key="error",
            chart="error",
            label=Text(zh="fp16 反向", en="backward in fp16"),
            x=x,
            y=Axis(label=Text(zh="梯度的相对误差", en="Relative error of the gradient"), log=True),
            provenance="measured",
            points=tuple((k, scale["error"]) for k, scale in fit),
        ),
        Series(
            key="scale",
            chart="trace",
            label=Text(zh="放大倍数的指数", en="exponent of the scale"),
            x=Axis(label=Text(zh="步", en="Step")),
            y=Axis(label=Text(zh="动态放大：log2(倍数)", en="Dynamic scale: log2 of the factor")),
            provenance="measured",
            points=tuple((float(step), exponent) for step, exponent, _, _ in trace),
        ),
    )
