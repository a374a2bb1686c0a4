"""Stage 6: one lab: a prediction first, then the measurement beside the model."""

from __future__ import annotations

from sihe.cli.demo.journal import Figures
from sihe.cli.demo.stage import Walk

LAB = "zero.memory"


def measure(walk: Walk) -> Figures:
    """Runs the lab and shows its claims."""
    from sihe.apps.coach.service import CoachService

    locale = walk.workspace.settings.locale
    result = CoachService(walk.workspace).run_lab(LAB)
    claims = [
        {"name": claim.label.of(locale), "shown": claim.shown, "provenance": claim.provenance}
        for claim in result.claims
    ]
    for claim in claims:
        walk.screen.detail(f"{claim['name']}: {claim['shown']} ({claim['provenance']})")
    return {"lab": LAB, "claims": claims}
