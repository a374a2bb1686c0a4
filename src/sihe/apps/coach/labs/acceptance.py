"""Lab `spec.acceptance`: what the rule of speculative decoding keeps and yields, and that the distribution stays."""

from __future__ import annotations

from collections.abc import Mapping

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

LENGTHS = (1, 2, 4, 8)


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Verifies `trials` proposals of each of `LENGTHS` by the engine's own rule, and times passes of as many tokens."""
    trials, noise, batch = int(parameters["trials"]), float(parameters["noise"]), int(parameters["batch"])
    (found,) = run_ranks(
        "sihe.apps.coach.labs.acceptance_ranks:verified",
        {"lengths": list(LENGTHS), "trials": trials, "noise": noise, "batch": batch},
        world_size=1,
        limit_s=limit_s,
        threads=2,
    )
    overlap, four = found["overlap"], LENGTHS.index(4)
    base_s, times = found["pass_s"][0], found["pass_s"][1:]
    gains = [tokens * base_s / taken for tokens, taken in zip(found["tokens"], times, strict=True)]
    best = max(range(len(LENGTHS)), key=lambda place: gains[place])
    return Measurement(
        values={
            "overlap": overlap,
            "accepted": found["accepted"],
            "tokens-measured": found["tokens"][four],
            "tokens-modelled": tokens_per_pass(overlap, 4),
            "distance": found["distance"],
            "distance-fresh": found["fresh_distance"],
            "distance-wrong": found["wrong_distance"],
            "cost-alone": times[four] / base_s,
            "cost-batch": found["batch_pass_s"][1] / found["batch_pass_s"][0],
            "gain-alone": gains[four],
            "gain-batch": found["tokens"][four] * found["batch_pass_s"][0] / found["batch_pass_s"][1],
            "best-length": float(LENGTHS[best]),
        },
        tables=(_table(found["tokens"], overlap, base_s, times, gains),),
        series=(
            _series("measured", Text(zh="实测", en="Measured"), "measured", found["tokens"]),
            _series(
                "modelled",
                Text(zh="公式", en="Formula"),
                "modelled",
                [tokens_per_pass(overlap, length) for length in LENGTHS],
            ),
        ),
    )


def tokens_per_pass(acceptance: float, length: int) -> float:
    """Expected tokens of a pass that verifies `length` proposals (arXiv 2211.17192, equation 1)."""
    return length + 1.0 if acceptance == 1 else (1 - acceptance ** (length + 1)) / (1 - acceptance)


def _table(tokens: list[float], overlap: float, base_s: float, times: list[float], gains: list[float]) -> Table:
    return Table(
        key="passes",
        title=Text(zh="一次前向", en="One pass"),
        columns=(
            Column(label=Text(zh="提议的词元", en="Proposed")),
            Column(label=Text(zh="得到的词元", en="Tokens gained"), provenance="measured"),
            Column(label=Text(zh="公式", en="Formula"), provenance="modelled"),
            Column(label=Text(zh="用时之比", en="Time of the pass"), unit="×", provenance="measured"),
            Column(label=Text(zh="加速（草稿不计）", en="Speed-up, draft free"), unit="×", provenance="measured"),
        ),
        rows=tuple(
            (
                length,
                round(tokens[place], 3),
                round(tokens_per_pass(overlap, length), 3),
                round(times[place] / base_s, 3),
                round(gains[place], 3),
            )
            for place, length in enumerate(LENGTHS)
        ),
    )


def _series(key: str, label: Text, provenance: str, tokens: list[float]) -> Series:
    return Series.model_validate(
        {
            "key": key,
            "chart": "tokens",
            "label": label,
            "x": Axis(label=Text(zh="提议的词元", en="Proposed tokens")),
            "y": Axis(label=Text(zh="一次前向得到的词元", en="Tokens of a pass")),
            "provenance": provenance,
            "points": tuple((float(length), value) for length, value in zip(LENGTHS, tokens, strict=True)),
        }
    )
