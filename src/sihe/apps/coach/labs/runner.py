"""Turns what a lab measured into a result: every promised claim with its unit and source, and the explanation.

Pure but for `machine`, which asks the machine its name.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from datetime import datetime

from sihe.apps.coach.errors import LabFailed
from sihe.apps.coach.labs.ranks import cores
from sihe.apps.coach.labs.types import Claim, Lab, LabResult, Measurement
from sihe.apps.coach.schema import Text

_PLACE = re.compile(r"\{([a-z0-9-]+)\}")


def result_of(
    lab: Lab,
    parameters: Mapping[str, int | float],
    measurement: Measurement,
    *,
    started_at: datetime,
    elapsed_s: float,
) -> LabResult:
    """The result of a lab. Raises `LabFailed` when the measurement breaks the lab's promise."""
    promised, delivered = {claim.key for claim in lab.claims}, set(measurement.values)
    if promised != delivered:
        raise LabFailed(
            f"lab {lab.id} promised {sorted(promised)}; missing {sorted(promised - delivered)}, "
            f"unknown {sorted(delivered - promised)}"
        )
    claims = tuple(
        Claim(
            key=spec.key,
            label=spec.label,
            value=measurement.values[spec.key],
            unit=spec.unit,
            provenance=spec.provenance,
            source=spec.source,
            digits=spec.digits,
        )
        for spec in lab.claims
    )
    shown = {claim.key: claim.shown for claim in claims}
    return LabResult(
        lab=lab.id,
        parameters=dict(parameters),
        claims=claims,
        tables=measurement.tables,
        series=measurement.series,
        timelines=measurement.timelines,
        explanation=Text(zh=fill(lab.explanation.zh, shown), en=fill(lab.explanation.en, shown)),
        machine=machine(),
        started_at=started_at,
        elapsed_s=elapsed_s,
    )


def fill(template: str, shown: Mapping[str, str]) -> str:
    """`template` with every `{claim}` replaced by its number."""
    return _PLACE.sub(lambda match: shown[match.group(1)], template)


def places(template: str) -> set[str]:
    """The claims that an explanation names."""
    return set(_PLACE.findall(template))


def machine() -> dict[str, str]:
    """What a reader needs to know about where the numbers were taken; a load above the cores makes timings doubtful."""
    load = {"load": f"{os.getloadavg()[0]:.1f}"} if hasattr(os, "getloadavg") else {}
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(cores()),
        "python": platform.python_version(),
        **load,
    }
