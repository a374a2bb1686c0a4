"""Lab `elastic.kill`: a rank of a real run is SIGKILLed; what is repeated, and whether the end is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

_GLOBAL_BATCH = 8
_KILLED_RANK = 1


def resumed_step(kill_step: int, checkpoint_every: int) -> int:
    """The step of the newest checkpoint when `kill_step` steps were done: c · floor(k / c)."""
    return kill_step // checkpoint_every * checkpoint_every


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Trains twice with two ranks, once with a death after `kill-step` steps."""
    kill_step, every = int(parameters["kill-step"]), int(parameters["checkpoint-every"])
    (answer,) = run_ranks(
        "sihe.apps.coach.labs.elastic_ranks:kill",
        {"kill_rank": _KILLED_RANK, "kill_step": kill_step, "checkpoint_every": every},
        world_size=1,
        limit_s=limit_s,
        threads=1,
    )
    calm, struck = answer["calm"], answer["struck"]
    _, again_from, next_sample = struck["ready"][-1]
    return Measurement(
        values={
            "resumed-step": again_from,
            "resumed-step-modelled": resumed_step(kill_step, every),
            "repeated": len(struck["steps"]) - len(calm["steps"]),
            "next-sample": next_sample,
            "next-sample-modelled": resumed_step(kill_step, every) * _GLOBAL_BATCH,
            "restarts": struck["restarts"],
            "steps": len(calm["steps"]),
            "steps-differing": differing(calm["steps"], struck["steps"]),
            "mean-repeated": (every - 1) / 2,
        },
        tables=(_table(calm["steps"], struck["steps"]),),
        series=(
            _series("calm", Text(zh="没有被打断", en="Undisturbed"), calm["steps"]),
            _series("struck", Text(zh="被打断", en="Struck"), struck["steps"]),
        ),
    )


def differing(calm: Sequence[Sequence[Any]], struck: Sequence[Sequence[Any]]) -> int:
    """Steps of `struck`, repeated ones included, whose loss, gradient norm, samples or position are not those of `calm`
    to the last bit; steps that only one of them has count too."""
    expected = {step: values for step, *values in calm}
    wrong = sum(expected.get(step) != values for step, *values in struck)
    return wrong + len(expected.keys() - {step for step, *_ in struck})


def _table(calm: Sequence[Sequence[Any]], struck: Sequence[Sequence[Any]]) -> Table:
    losses = {step: loss for step, loss, *_ in calm}
    return Table(
        key="steps",
        title=Text(zh="被打断的一次，按实际计算的先后", en="The struck run, in the order in which it was computed"),
        columns=(
            Column(label=Text(zh="步", en="Step")),
            Column(label=Text(zh="损失", en="Loss"), unit="nat", provenance="measured"),
            Column(label=Text(zh="没有被打断时", en="Undisturbed"), unit="nat", provenance="measured"),
            Column(label=Text(zh="下一个样本", en="Next sample"), provenance="measured"),
        ),
        rows=tuple((step, loss, losses.get(step), after) for step, loss, _, _, after in struck),
    )


def _series(key: str, label: Text, steps: Sequence[Sequence[Any]]) -> Series:
    return Series(
        key=key,
        chart="position",
        label=label,
        x=Axis(label=Text(zh="第几次计算", en="Computed as number")),
        y=Axis(label=Text(zh="步", en="Step")),
        provenance="measured",
        points=tuple((float(place), float(step[0])) for place, step in enumerate(steps, start=1)),
    )
