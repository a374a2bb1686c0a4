"""Recipe files: what ships can be read, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sihe.core.errors import ConfigError
from sihe.training.recipes.config import GrpoStage, PpoStage, RecipeConfig
from sihe.training.recipes.reader import load_recipe, recipe_names
from support.tiny_recipes import MODEL, SFT, UPDATE, tiny_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_ships_comes_back_from_its_own_settings(name: str) -> None:
    recipe = load_recipe(name)
    assert RecipeConfig.from_mapping(recipe.public()) == recipe
    assert len(recipe_names()) >= 9


def test_settings_of_a_stage_go_by_its_number() -> None:
    recipe = load_recipe("grpo", {"stages.1.rollout": "local", "stages.1.update.steps": 16, "task.largest": 19})
    stage = recipe.stages[1]
    assert isinstance(stage, GrpoStage)
    assert (stage.rollout, stage.update.steps, recipe.task.largest) == ("local", 16, 19)


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ({"kind": "sftt"}, "stages.1.kind"),
        ({"kind": "preference", "bta": 1}, "stages.1.bta"),
        ({"kind": "preference", "loss": "simpo"}, "stages.1.loss"),
        ({"kind": "preference", "beta": "high"}, "stages.1.beta"),
        ({"kind": "preference", "loss": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"kind": "reward", "update": {**UPDATE, "stepss": 3}}, "stages.1.update.stepss"),
        ({"kind": "reward", "update": {"steps": 3, "batch": 2}}, "stages.1.update.peak_lr"),
        ({"kind": "reward", "update": {**UPDATE, "warmup_steps": 9}}, "update.warmup_steps"),
        ({"kind": "ppo", "epochs": 1}, "stages.1.kind"),
        ({"kind": "grpo", "group": 1}, "group"),
        ({"kind": "grpo", "group": 3}, "update.batch"),
        ({"kind": "grpo", "epochs": 5}, "update.steps"),
        ({"kind": "grpo", "sync_every": 3, "max_staleness": 1}, "max_staleness"),
        ({"kind": "sft", "adapter": {"lora": {"rank": 0}}}, "lora.rank"),
        ({"kind": "sft", "adapter": {"lora": {}, "base": "int2"}}, "stages.1.adapter.base"),
        ({"kind": "distil"}, "stages.1.student"),
    ],
)
def test_a_wrong_setting_is_named(stage: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        tiny_recipe(stage)
    assert raised.value.key == key
    assert key in str(raised.value)


def test_what_is_wrong_with_the_whole_is_named() -> None:
    for changes, key in [
        ({"stages": []}, "stages"),
        ({"stages": [{"kind": "reward", "update": UPDATE}]}, "stages.0.kind"),
        ({"stages": [{**SFT, "adapter": {"lora": {}}}]}, "stages.0.adapter"),
        ({"goal": "sideways"}, "goal"),
        ({"speed": 3}, "speed"),
        ({"task": {"largest": 2, "held_out": 9}}, "task.held_out"),
        ({"model": {**MODEL, "hidden": 3}}, "model.hidden"),
    ]:
        with pytest.raises(ConfigError) as raised:
            tiny_recipe(**changes)
        assert raised.value.key == key, changes


def test_ppo_after_a_reward_stage_is_fine() -> None:
    recipe = tiny_recipe({"kind": "reward"}, {"kind": "ppo", "epochs": 2})
    assert isinstance(recipe.stages[2], PpoStage)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a file nor a recipe; recipes are distil, dpo"):
        load_recipe("dop")
    for text, said in [("- 1", "settings, one a line"), ("a: [", "not valid YAML")]:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_recipe(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="stages go from 0 to 1"):
        load_recipe("dpo", {"stages.7.beta": 1})
    with pytest.raises(ConfigError, match="which setting of the stage"):
        load_recipe("dpo", {"stages.1": 1})
