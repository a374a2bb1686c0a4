"""Recipes of a second: a few steps of every stage with a model of some thousand weights."""

from __future__ import annotations

from typing import Any

from sihe.training.recipes.config import RecipeConfig

MODEL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
UPDATE = {"steps": 2, "batch": 8, "peak_lr": 1e-3, "warmup_steps": 0, "eval_every": 1}
SFT = {"kind": "sft", "update": UPDATE}


def tiny_recipe(*stages: dict[str, Any], **changes: Any) -> RecipeConfig:
    """A recipe with `stages` behind a first one of SFT, 2 steps each unless they say otherwise."""
    values: dict[str, Any] = {
        "name": "tiny",
        "metric": "accuracy",
        "goal": "up",
        "model": MODEL,
        "task": {"largest": 4, "held_out": 5},
        "checkpoint_every": 1,
        "stages": [SFT, *({"update": UPDATE, **stage} for stage in stages)],
    }
    return RecipeConfig.from_mapping(values | changes)
