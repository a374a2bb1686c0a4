"""Lab `quant.error_speed`: weights of 16, 8 and 4 bits in the engine's own kernels: how fast, and how wrong."""

from __future__ import annotations

from collections.abc import Mapping

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

KINDS = ("float32", "bfloat16", "int8", "int4")
BATCHES = (1, 8, 32)
_LABELS = {
    "float32": Text(zh="float32", en="float32"),
    "bfloat16": Text(zh="bfloat16", en="bfloat16"),
    "int8": Text(zh="int8，每列一个缩放", en="int8, a scale a column"),
    "int4": Text(zh="int4，每 32 个一个缩放", en="int4, a scale for 32"),
}


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Decodes with a model of `layers` layers in each precision and batch, and rounds a matrix in several ways."""
    layers, outlier = int(parameters["layers"]), float(parameters["outlier"])
    (found,) = run_ranks(
        "sihe.apps.coach.labs.quant_speed_ranks:costs",
        {"layers": layers, "kinds": list(KINDS), "batches": list(BATCHES), "outlier": outlier},
        world_size=1,
        limit_s=limit_s,
        threads=2,
    )
    speed, size, error = found["tokens_per_s"], found["weight_bytes"], found["errors"]
    # A step at batch 1 reads its weights once: where that was faster than the probes, memory can do at least that.
    bandwidth = max(found["bandwidth_bytes_per_s"], *(speed[kind][0] * size[kind] for kind in ("float32", "bfloat16")))
    values = {f"{kind}-limit": bandwidth / size[kind] for kind in KINDS}
    for kind in KINDS:
        values[f"{kind}-one"] = speed[kind][0]
        values[f"{kind}-many"] = speed[kind][-1]
    return Measurement(
        values={
            **values,
            "bandwidth": bandwidth / 1e9,
            "int4-gain-one": speed["int4"][0] / speed["bfloat16"][0],
            "int8-gain-one": speed["int8"][0] / speed["bfloat16"][0],
            "int4-gain-many": speed["int4"][-1] / speed["bfloat16"][-1],
            "int8-gain-many": speed["int8"][-1] / speed["bfloat16"][-1],
            "int4-bits": found["int4_bits"],
            "error-bfloat16": 100 * error["bfloat16"],
            "error-int8": 100 * error["int8"],
            "error-int4": 100 * error["int4"],
            "error-int4-row": 100 * error["int4-row"],
            "error-int8-outlier": 100 * error["int8-outlier"],
            "error-int4-outlier": 100 * error["int4-outlier"],
            "error-int8-tensor-outlier": 100 * error["int8-tensor-outlier"],
        },
        tables=(_table(speed, size),),
        series=tuple(_series(kind, speed[kind]) for kind in KINDS),
    )


def _table(speed: Mapping[str, list[float]], size: Mapping[str, int]) -> Table:
    return Table(
        key="speed",
        title=Text(zh="整个模型的解码", en="Decoding with the whole model"),
        columns=(
            Column(label=Text(zh="权重", en="Weights")),
            Column(label=Text(zh="一步读多少", en="Read in a step"), unit="MB", provenance="measured"),
            *(
                Column(label=Text(zh=f"批次 {batch}", en=f"Batch {batch}"), unit="tok/s", provenance="measured")
                for batch in BATCHES
            ),
        ),
        rows=tuple((kind, round(size[kind] / 1e6, 1), *(round(rate, 1) for rate in speed[kind])) for kind in KINDS),
    )


def _series(kind: str, rates: list[float]) -> Series:
    return Series(
        key=kind,
        chart="speed",
        label=_LABELS[kind],
        x=Axis(label=Text(zh="批次", en="Batch"), log=True),
        y=Axis(label=Text(zh="解码速度", en="Decoding"), unit="tok/s", log=True),
        provenance="measured",
        points=tuple((float(batch), rate) for batch, rate in zip(BATCHES, rates, strict=True)),
    )
