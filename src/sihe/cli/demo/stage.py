"""What a stage of the demo is given and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sihe.cli.demo.journal import Figures, Journal
from sihe.cli.demo.screen import Screen
from sihe.core.workspace import Workspace


@dataclass(frozen=True)
class Walk:
    """One walk through the house: where it works, what it has done, and where it speaks."""

    workspace: Workspace
    journal: Journal
    screen: Screen

    def figure(self, stage: str, key: str) -> object:
        """A figure of an earlier stage."""
        figures = self.journal.figures(stage)
        if figures is None:
            raise LookupError(f"stage {stage!r} has not run")
        return figures[key]


@dataclass(frozen=True)
class Stage:
    """One part of the walk. `run` may be repeated after a kill and gives its figures."""

    name: str
    title: str
    run: Callable[[Walk], Figures]
