"""Stage 6: one lab: a prediction first, then the measurement beside the model."""

from __future__ import annotations

from sihe.cli.demo.journal import Figures
from sihe.cli.demo.stage import Walk

LAB = "zero.memory"


def measure(walk: Walk) -> Figures:
    """Runs the lab and shows its claims."""
    from sihe.apps.coach.service import CoachService

    result = CoachService(walk.workspace).run_lab(LAB)
    claims = [
        {"name": claim.name, "value": claim.value, "unit": claim.unit, "provenance": claim.provenance}
        for claim in result.claims
    ]
    for claim in claims:
        walk.screen.detail(f"{claim['name']}: {claim['value']:.4g} {claim['unit']} ({claim['provenance']})")
    return {"lab": LAB, "claims": claims}
