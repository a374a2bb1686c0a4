"""Lab `allreduce.ring`: a ring all-reduce of our own, beside gloo's and beside the alpha-beta model of its time.

The model (Thakur, Rabenseifner and Gropp, 2005, section 3): a message of n bytes takes α + βn, and a ring of N ranks
sends 2(N − 1) messages of S/N bytes one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text
from sihe.cluster.collectives import costs
from sihe.cluster.collectives.fit import fit_link

_ITEM_BYTES = 4  # float32
_SMALLEST_ITEMS = 3072  # divisible by 2, 3 and 4, so that every chunk of a ring is equally long
_MIB = 2**20


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Times both all-reduces over a range of sizes on `ranks` processes."""
    ranks = int(parameters["ranks"])
    sizes = message_items(parameters["largest-mib"])
    answers = run_ranks(
        "sihe.apps.coach.labs.allreduce_ranks:times",
        {"items": sizes, "repeats": int(parameters["repeats"])},
        world_size=ranks,
        limit_s=limit_s,
    )
    # A collective takes as long as its slowest rank.
    ring = [max(answer["ring_s"][index] for answer in answers) for index in range(len(sizes))]
    gloo = [max(answer["gloo_s"][index] for answer in answers) for index in range(len(sizes))]
    link = fit_link([(items * _ITEM_BYTES, seconds) for items, seconds in answers[0]["ping_pong"]])
    modelled = [costs.ring(items * _ITEM_BYTES, ranks, link).seconds for items in sizes]
    largest = sizes[-1] * _ITEM_BYTES
    sent = max(answer["sent_bytes"][-1] for answer in answers)
    return Measurement(
        values={
            "sent-measured": sent / largest,
            "sent-modelled": 2 * (ranks - 1) / ranks,
            "naive-modelled": 2.0 * (ranks - 1),
            "difference": max(answer["difference"] for answer in answers),
            "alpha": link.latency_s * 1e6,
            "bandwidth": link.bandwidth / 1e9,
            "ring-time": ring[-1] * 1e3,
            "gloo-time": gloo[-1] * 1e3,
            "ring-over-gloo": ring[-1] / gloo[-1],
            "ring-over-model": median(taken / expected for taken, expected in zip(ring, modelled, strict=True)),
            "bus-bandwidth": sent / ring[-1] / 1e9,
        },
        tables=(_table(sizes, ring, gloo, modelled),),
        series=_series(sizes, ring, gloo, modelled),
    )


def message_items(largest_mib: float) -> list[int]:
    """Message sizes in float32 items, growing fourfold up to `largest_mib` MiB."""
    sizes = [_SMALLEST_ITEMS]
    while sizes[-1] * 4 * _ITEM_BYTES <= largest_mib * _MIB:
        sizes.append(sizes[-1] * 4)
    return sizes


def _table(sizes: list[int], ring: list[float], gloo: list[float], modelled: list[float]) -> Table:
    return Table(
        key="times",
        title=Text(
            zh="各消息大小的用时（毫秒，最慢的进程，取多次中最快的一次）",
            en="Time by message size (ms, slowest rank, best of several)",
        ),
        columns=(
            Column(label=Text(zh="消息", en="Message"), unit="KiB"),
            Column(label=Text(zh="我们的环", en="Our ring"), unit="ms", provenance="measured"),
            Column(label=Text(zh="gloo", en="gloo"), unit="ms", provenance="measured"),
            Column(label=Text(zh="α-β 模型", en="α-β model"), unit="ms", provenance="modelled"),
        ),
        rows=tuple(
            (items * _ITEM_BYTES / 1024, *(round(seconds * 1e3, 4) for seconds in row))
            for items, *row in zip(sizes, ring, gloo, modelled, strict=True)
        ),
    )


def _series(sizes: list[int], ring: list[float], gloo: list[float], modelled: list[float]) -> tuple[Series, ...]:
    x = Axis(label=Text(zh="消息大小", en="Message size"), unit="B", log=True)
    y = Axis(label=Text(zh="用时", en="Time"), unit="ms", log=True)
    curves = (
        ("ring", Text(zh="我们的环", en="Our ring"), "measured", ring),
        ("gloo", Text(zh="gloo", en="gloo"), "measured", gloo),
        ("model", Text(zh="α-β 模型", en="α-β model"), "modelled", modelled),
    )
    return tuple(
        Series.model_validate(
            {
                "key": key,
                "chart": "time",
                "label": label,
                "x": x,
                "y": y,
                "provenance": provenance,
                "points": [(items * _ITEM_BYTES, seconds * 1e3) for items, seconds in zip(sizes, times, strict=True)],
            }
        )
        for key, label, provenance, times in curves
    )
