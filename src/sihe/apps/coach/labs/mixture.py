"""Lab `moe.balance`: how unevenly a router loads its experts, by the way it is balanced, and what capacity drops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

_FACTORS = (1.0, 1.25, 1.5, 2.0, 4.0)
_NAMES = {
    "none": Text(zh="不平衡", en="no balance"),
    "loss": Text(zh="平衡损失", en="balance loss"),
    "bias": Text(zh="偏置", en="bias"),
}


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Trains one small mixture in each of the three ways, in one process."""
    experts, steps = int(parameters["experts"]), int(parameters["steps"])
    found = run_ranks(
        "sihe.apps.coach.labs.mixture_ranks:balances",
        {"experts": experts, "chosen": int(parameters["chosen"]), "steps": steps, "factors": list(_FACTORS)},
        world_size=1,
        limit_s=limit_s,
    )[0]
    values: dict[str, float] = {"most-uneven": experts / int(parameters["chosen"])}
    for way, trained in found.items():
        values |= {
            f"{way}-imbalance": trained["imbalance"],
            f"{way}-dropped": trained["dropped"][_FACTORS.index(1.25)],
            f"{way}-test-loss": trained["loss"],
        }
    values["none-dropped-at-2"] = found["none"]["dropped"][_FACTORS.index(2.0)]
    values["none-idle"] = sum(1 for load in found["none"]["load"] if load < 0.25 * _mean(found["none"]["load"]))
    return Measurement(values=values, tables=(_loads(found), _drops(found)), series=_series(found))


def _mean(loads: list[int]) -> float:
    return sum(loads) / len(loads)


def _loads(found: Mapping[str, Any]) -> Table:
    experts = range(len(found["none"]["load"]))
    return Table(
        key="loads",
        title=Text(
            zh="各专家分到的选择，相对于平均（最不均匀的一层）",
            en="Choices of each expert, relative to the mean (the most uneven layer)",
        ),
        columns=(
            Column(label=Text(zh="专家", en="Expert")),
            *(Column(label=_NAMES[way], provenance="measured") for way in found),
        ),
        rows=tuple(
            (expert, *(round(trained["load"][expert] / _mean(trained["load"]), 3) for trained in found.values()))
            for expert in experts
        ),
    )


def _drops(found: Mapping[str, Any]) -> Table:
    return Table(
        key="drops",
        title=Text(zh="各容量系数下丢弃的选择占比", en="Share of choices dropped, by capacity factor"),
        columns=(
            Column(label=Text(zh="容量系数", en="Capacity factor")),
            *(Column(label=_NAMES[way], provenance="measured") for way in found),
        ),
        rows=tuple(
            (factor, *(round(trained["dropped"][index], 4) for trained in found.values()))
            for index, factor in enumerate(_FACTORS)
        ),
    )


def _series(found: Mapping[str, Any]) -> tuple[Series, ...]:
    return tuple(
        Series(
            key=way,
            chart="imbalance",
            label=_NAMES[way],
            x=Axis(label=Text(zh="步", en="Step")),
            y=Axis(label=Text(zh="最满的专家 / 平均", en="Fullest expert over the mean")),
            provenance="measured",
            points=tuple((float(step), value) for step, value in trained["trace"]),
        )
        for way, trained in found.items()
    )
