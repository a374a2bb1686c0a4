"""Lab `zero.memory`: the bytes that a rank holds for each parameter at each stage of ZeRO, beside the formulas."""

from __future__ import annotations

from collections.abc import Mapping

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Column, Measurement, Table
from sihe.apps.coach.schema import Text

# Bytes per parameter under mixed-precision Adam, and the first stage that shards them
# (arXiv 1910.02054, sections 3 and 5).
_WEIGHT = (2, 3)  # bf16
_GRADIENT = (2, 2)  # bf16
_OPTIMIZER = (12, 1)  # fp32: master weight, momentum, variance

_PAPER_GB = {0: 120.0, 1: 31.4, 2: 16.6, 3: 1.88}  # arXiv 1910.02054, figure 1: 7.5 B parameters, 64 ranks
_STAGES = (0, 1, 2, 3)


def bytes_per_parameter(stage: int, ranks: int) -> float:
    """Model-state bytes per parameter on one of `ranks` ranks at a stage of ZeRO, 0 to 3."""
    return sum(size / ranks if stage >= first else size for size, first in (_WEIGHT, _GRADIENT, _OPTIMIZER))


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Runs the four stages on `ranks` processes; the fullest rank counts."""
    ranks = int(parameters["ranks"])
    shape = {"hidden": parameters["hidden"], "blocks": parameters["blocks"]}
    answers = run_ranks("sihe.apps.coach.labs.zero_ranks:stages", shape, world_size=ranks, limit_s=limit_s)
    values: dict[str, float] = {f"paper-stage{stage}": size for stage, size in _PAPER_GB.items()}
    rows = []
    for stage in _STAGES:
        fullest = max((answer["stages"][stage] for answer in answers), key=lambda held: held["total"])
        modelled = bytes_per_parameter(stage, ranks)
        values[f"stage{stage}-measured"] = fullest["total"]
        values[f"stage{stage}-modelled"] = modelled
        rows.append((stage, fullest["weights"], fullest["gradients"], fullest["optimizer"], fullest["total"], modelled))
    values["stage2-extra"] = values["stage2-measured"] - values["stage2-modelled"]
    values["gradient-difference"] = max(answer["gradient_difference"] for answer in answers)
    return Measurement(values=values, tables=(_table(rows, ranks, answers[0]["parameters"]),))


def _table(rows: list[tuple[int, float, float, float, float, float]], ranks: int, parameters: int) -> Table:
    return Table(
        key="bytes",
        title=Text(
            zh=f"每个参数的字节数，N = {ranks}，共 {parameters:,} 个参数",
            en=f"Bytes per parameter, N = {ranks}, {parameters:,} parameters",
        ),
        columns=(
            Column(label=Text(zh="阶段", en="Stage")),
            Column(label=Text(zh="权重", en="Weights"), unit="B/param", provenance="measured"),
            Column(label=Text(zh="梯度", en="Gradients"), unit="B/param", provenance="measured"),
            Column(label=Text(zh="优化器", en="Optimizer"), unit="B/param", provenance="measured"),
            Column(label=Text(zh="合计", en="Total"), unit="B/param", provenance="measured"),
            Column(label=Text(zh="公式", en="Formula"), unit="B/param", provenance="modelled"),
        ),
        rows=tuple(rows),
    )
