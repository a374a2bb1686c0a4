"""Lab `dpo.margin`: what the loss of direct preference optimisation asks for at each margin, and what a policy does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Provenance, Series, Table
from sihe.apps.coach.schema import Text

_BETAS = (0.05, 0.1, 0.5)
_MARGINS = tuple(float(margin) for margin in range(-20, 41, 4))
_PREPARATION = 200  # steps of supervised training before


def gradient_weight(beta: float, margin: float) -> float:
    """How strongly a pair pulls: beta sigmoid(-beta margin) (Rafailov et al. 2023, arXiv 2305.18290, section 4)."""
    return beta / (1 + math.exp(beta * margin))


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Evaluates the loss on a grid, and trains a tiny policy on preferences over sums."""
    beta, margin, steps = float(parameters["beta"]), float(parameters["margin"]), int(parameters["steps"])
    betas = sorted({*_BETAS, beta})
    (answer,) = run_ranks(
        "sihe.apps.coach.labs.preference_ranks:preference",
        {
            "betas": betas,
            "margins": [*_MARGINS, 0.0, margin],
            "beta": beta,
            "prepare": _PREPARATION,
            "steps": steps,
        },
        world_size=1,
        limit_s=limit_s,
        threads=1,
    )
    curves, course = answer["curves"], answer["course"]
    of_beta, end = curves[str(beta)], course[-1]
    lowest = min(course, key=lambda point: point["chosen"])
    grid = {
        f"{name}-{one:g}".replace(".", "-"): (one, curves[str(one)][name])
        for name in ("loss", "weight")
        for one in betas
    }
    return Measurement(
        values={
            "loss-at-start": course[0]["loss"],
            "loss-at-margin": of_beta["loss"][-1],
            "weight-at-zero": of_beta["weight"][-2],
            "weight-at-margin": of_beta["weight"][-1],
            "weight-modelled": gradient_weight(beta, margin),
            "half-margin": math.log(3) / beta,
            "margin-at-end": end["margin"],
            "chosen-at-end": end["chosen"],
            "rejected-at-end": end["rejected"],
            "chosen-lowest": lowest["chosen"],
            "chosen-fell": end["chosen_fell"],
            "accuracy-at-end": end["accuracy"],
            "alike-chosen": answer["displacements"]["alike"]["chosen"],
            "alike-third": answer["displacements"]["alike"]["third"],
            "unlike-chosen": answer["displacements"]["unlike"]["chosen"],
        },
        tables=(_table(course),),
        series=(
            *(_curve(key, key.split("-")[0], one, values) for key, (one, values) in grid.items()),
            _course("chosen", Text(zh="被选的", en="Chosen"), course),
            _course("rejected", Text(zh="被拒的", en="Rejected"), course),
            _course("margin", Text(zh="差", en="Margin"), course),
        ),
    )


def _curve(key: str, chart: str, beta: float, values: list[float]) -> Series:
    names = {"loss": Text(zh="损失", en="Loss"), "weight": Text(zh="梯度权重", en="Gradient weight")}
    return _series(
        key,
        chart,
        Text(zh=f"β = {beta:g}", en=f"β = {beta:g}"),
        Axis(label=Text(zh="对数比之差", en="Margin of log-ratios"), unit="nat"),
        Axis(label=names[chart]),
        list(zip(_MARGINS, values, strict=False)),
        "modelled",
    )


def _course(key: str, label: Text, course: list[dict[str, Any]]) -> Series:
    x = Axis(label=Text(zh="DPO 的步", en="Step of DPO"))
    y = Axis(label=Text(zh="对参考的对数比", en="Log-ratio to the reference"), unit="nat")
    return _series(key, "course", label, x, y, [(point["step"], point[key]) for point in course], "measured")


def _series(
    key: str, chart: str, label: Text, x: Axis, y: Axis, points: list[tuple[float, float]], provenance: Provenance
) -> Series:
    return Series(key=key, chart=chart, label=label, x=x, y=y, provenance=provenance, points=tuple(points))


def _table(course: list[dict[str, Any]]) -> Table:
    names = (
        ("loss", Text(zh="损失", en="Loss")),
        ("chosen", Text(zh="被选的对数比", en="Chosen log-ratio")),
        ("rejected", Text(zh="被拒的对数比", en="Rejected log-ratio")),
        ("margin", Text(zh="差", en="Margin")),
        ("accuracy", Text(zh="正确排序的比例", en="Pairs in the right order")),
        ("chosen_fell", Text(zh="被选者下降的比例", en="Chosen that fell")),
    )
    return Table(
        key="course",
        title=Text(zh="没有训练过的 20 对", en="20 held-out pairs"),
        columns=(
            Column(label=Text(zh="步", en="Step")),
            *(Column(label=label, provenance="measured") for _, label in names),
        ),
        rows=tuple((int(point["step"]), *(round(point[name], 3) for name, _ in names)) for point in course),
    )
