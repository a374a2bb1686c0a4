"""Lab `attention.cost`: what attention costs in time and memory as the sequence grows, naive and fused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

_SHORTEST = 128
_ITEM_BYTES = 4  # float32
_MIB = 2**20
_FITTED = 3  # the exponents are fitted on the longest lengths, where the fixed costs no longer show


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Times both forms, and takes the memory that they need, at lengths that double up to `longest`."""
    lengths = sequence_lengths(int(parameters["longest"]))
    heads, head_dim = int(parameters["heads"]), int(parameters["head-dim"])
    (taken,) = run_ranks(
        "sihe.apps.coach.labs.attention_ranks:costs",
        {"lengths": lengths, "heads": heads, "head_dim": head_dim},
        world_size=1,
        limit_s=limit_s,
        threads=2,
    )
    longest = lengths[-1]
    scores = score_bytes(longest, heads)
    return Measurement(
        values={
            "naive-memory-exponent": exponent(lengths, taken["naive_bytes"]),
            "fused-memory-exponent": exponent(lengths, taken["fused_bytes"]),
            "naive-time-exponent": exponent(lengths, taken["naive_s"]),
            "fused-time-exponent": exponent(lengths, taken["fused_s"]),
            "scores-modelled": scores / _MIB,
            "naive-memory": taken["naive_bytes"][-1] / _MIB,
            "fused-memory": taken["fused_bytes"][-1] / _MIB,
            "copies": taken["naive_bytes"][-1] / scores,
            "speedup": taken["naive_s"][-1] / taken["fused_s"][-1],
            "rate": attention_flops(longest, heads, head_dim) / taken["naive_s"][-1] / 1e9,
            "difference": taken["difference"],
        },
        tables=(_table(lengths, heads, taken),),
        series=(
            *_pair("memory", lengths, taken, "bytes", _MIB, Text(zh="额外内存峰值", en="Peak of extra memory"), "MiB"),
            *_pair("time", lengths, taken, "s", 1e-3, Text(zh="用时", en="Time"), "ms"),
        ),
    )


def sequence_lengths(longest: int) -> list[int]:
    """Lengths that double up to `longest`."""
    return [_SHORTEST * 2**step for step in range(int(math.log2(longest / _SHORTEST)) + 1)]


def score_bytes(length: int, heads: int) -> int:
    """Bytes of one score matrix of every head in float32: H·T²·4."""
    return heads * length * length * _ITEM_BYTES


def attention_flops(length: int, heads: int, head_dim: int) -> int:
    """Floating-point operations of the two products, H·4·T²·d: all of it, though a causal mask wastes half."""
    return heads * 4 * length * length * head_dim


def exponent(lengths: Sequence[int], costs: Sequence[float]) -> float:
    """The power with which the cost grows: the slope on logarithmic axes over the longest lengths."""
    slope, _ = np.polyfit(np.log(lengths[-_FITTED:]), np.log(costs[-_FITTED:]), 1)
    return float(slope)


def _table(lengths: list[int], heads: int, taken: dict[str, list[float]]) -> Table:
    return Table(
        key="costs",
        title=Text(zh="随长度 T 的代价", en="Cost by length T"),
        columns=(
            Column(label=Text(zh="T", en="T")),
            Column(
                label=Text(zh="一份分数矩阵 H·T²·4", en="One score matrix, H·T²·4"), unit="MiB", provenance="modelled"
            ),
            Column(label=Text(zh="朴素，内存", en="Naive, memory"), unit="MiB", provenance="measured"),
            Column(label=Text(zh="融合，内存", en="Fused, memory"), unit="MiB", provenance="measured"),
            Column(label=Text(zh="朴素，用时", en="Naive, time"), unit="ms", provenance="measured"),
            Column(label=Text(zh="融合，用时", en="Fused, time"), unit="ms", provenance="measured"),
        ),
        rows=tuple(
            (
                length,
                score_bytes(length, heads) / _MIB,
                *(round(taken[key][index] / scale, 4) for key, scale in _COLUMNS),
            )
            for index, length in enumerate(lengths)
        ),
    )


_COLUMNS = (("naive_bytes", _MIB), ("fused_bytes", _MIB), ("naive_s", 1e-3), ("fused_s", 1e-3))


def _pair(
    chart: str, lengths: list[int], taken: dict[str, list[float]], suffix: str, scale: float, label: Text, unit: str
) -> tuple[Series, ...]:
    """The naive and the fused curve of one chart."""
    x = Axis(label=Text(zh="长度 T", en="Length T"), log=True)
    return tuple(
        Series(
            key=f"{chart}-{form}",
            chart=chart,
            label=name,
            x=x,
            y=Axis(label=label, unit=unit, log=True),
            provenance="measured",
            points=tuple(
                (float(length), cost / scale) for length, cost in zip(lengths, taken[f"{form}_{suffix}"], strict=True)
            ),
        )
        for form, name in (
            ("naive", Text(zh="朴素", en="Naive")),
            ("fused", Text(zh="融合（SDPA）", en="Fused (SDPA)")),
        )
    )
