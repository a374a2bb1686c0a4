"""Two ranks that run a tiny recipe with every kind of stage, and store what each has in the end."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sihe.cluster.launchers.rank import supervised
from sihe.training.ranks import Ranks, joined
from sihe.training.recipes.config import RecipeConfig
from sihe.training.recipes.stages import Stages
from sihe.training.recipes.types import StageStep
from support.tiny_recipes import tiny_recipe

PAIRS = [{"kind": "reward"}, {"kind": "preference"}]
ROLLOUTS = [{"kind": "reward"}, {"kind": "ppo", "max_tokens": 3}, {"kind": "grpo", "group": 2, "max_tokens": 3}]


def recipe(*, rollouts: bool) -> RecipeConfig:
    """Without rollouts a recipe computes the same on any number of ranks; with them each rank draws its own."""
    stages = [{"epochs": 2, **stage} if "max_tokens" in stage else stage for stage in ROLLOUTS]
    return tiny_recipe(*(stages if rollouts else PAIRS))


def run(folder: Path, ranks: Ranks, *, rollouts: bool) -> dict[str, object]:
    """The last policy's weights and the loss of every step."""
    steps: list[tuple[str, float]] = []

    def note(event: object) -> None:
        if isinstance(event, StageStep):
            steps.append((event.stage, event.metrics["loss"]))

    made = Stages(recipe(rollouts=rollouts), folder, ranks=ranks, on_event=note).run()
    return {"weights": dict(made.policy.state_dict()), "steps": steps}


def main() -> None:
    folder = Path(sys.argv[1])
    with joined(60.0) as ranks:
        for rollouts in (False, True):
            stored = run(folder / f"recipes-{rollouts}", ranks, rollouts=rollouts)
            torch.save(stored, folder / f"{rollouts}-{ranks.rank}.pt")


if __name__ == "__main__":
    supervised(main)
