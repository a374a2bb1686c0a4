"""Lab `rlhf.kl`: three estimates of the divergence from a reference, and what its price leaves of a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

_BETAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_NAMES = ("k1", "k2", "k3")


def best_share(share: float, beta: float) -> float:
    """What the optimal policy gives to answers of reward 1 where the reference gives `share` and others have reward 0:
    q exp(1 / beta) / Z (Rafailov et al. 2023, arXiv 2305.18290, equation 4)."""
    return 1 / (1 + (1 - share) / share * math.exp(-1 / beta))


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Sums exactly over a small set of answers, draws from it, and climbs to the best policy."""
    distance, samples = float(parameters["distance"]), int(parameters["samples"])
    beta, share = float(parameters["beta"]), float(parameters["share"])
    (answer,) = run_ranks(
        "sihe.apps.coach.labs.kl_ranks:divergences",
        {"distance": distance, "samples": samples, "betas": sorted({*_BETAS, beta}), "share": share},
        world_size=1,
        limit_s=limit_s,
        threads=1,
    )
    exact, sampled, gradients = answer["exact"], answer["sampled"], answer["gradients"]
    optima = {one["beta"]: one for one in answer["optimum"]}
    values = {"kl": exact["kl"], "samples": samples}
    for name in _NAMES:
        values |= {
            f"{name}-mean": sampled[name]["mean"],
            f"{name}-bias": exact[name]["bias"],
            f"{name}-deviation": exact[name]["deviation"],
        }
    return Measurement(
        values={
            **values,
            "k1-negative": exact["k1"]["negative"],
            "k1-gradient": gradients["k1_length"],
            "k2-gradient": gradients["k2_reverse"],
            "k3-gradient": gradients["k3_reverse"],
            "k3-gradient-forward": gradients["k3_forward"],
            "good-share": optima[beta]["learnt"],
            "good-share-modelled": best_share(share, beta),
            "good-share-kl": optima[beta]["kl"],
            "cheap-share": optima[min(optima)]["learnt"],
            "dear-share": optima[max(optima)]["learnt"],
        },
        tables=(_estimates(exact, sampled),),
        series=(
            _series(
                "learnt", Text(zh="梯度上升", en="Gradient ascent"), {b: o["learnt"] for b, o in optima.items()}, True
            ),
            _series("closed", Text(zh="闭式解", en="Closed form"), {b: best_share(share, b) for b in optima}, False),
        ),
    )


def _estimates(exact: Mapping[str, Any], sampled: Mapping[str, Any]) -> Table:
    return Table(
        key="estimates",
        title=Text(zh="同一个 KL 的三种估计", en="Three estimates of one divergence"),
        columns=(
            Column(label=Text(zh="估计", en="Estimate")),
            Column(label=Text(zh="采样均值", en="Mean of samples"), unit="nat", provenance="measured"),
            Column(label=Text(zh="精确偏差", en="Exact bias"), unit="nat", provenance="modelled"),
            Column(label=Text(zh="精确标准差", en="Exact deviation"), unit="nat", provenance="modelled"),
            Column(label=Text(zh="采样标准差", en="Deviation of samples"), unit="nat", provenance="measured"),
            Column(label=Text(zh="为负的概率", en="Probability below 0"), provenance="modelled"),
        ),
        rows=tuple(
            (
                name,
                round(sampled[name]["mean"], 5),
                round(exact[name]["bias"], 6),
                round(exact[name]["deviation"], 5),
                round(sampled[name]["deviation"], 5),
                round(exact[name]["negative"], 4),
            )
            for name in _NAMES
        ),
    )


def _series(key: str, label: Text, shares: Mapping[float, float], is_measured: bool) -> Series:
    return Series(
        key=key,
        chart="shares",
        label=label,
        x=Axis(label=Text(zh="KL 系数 β", en="KL coefficient β"), log=True),
        y=Axis(label=Text(zh="好回答的概率", en="Probability of the good answers")),
        provenance="measured" if is_measured else "modelled",
        points=tuple(shares.items()),
    )
