"""A recipe in a workspace: tracked runs, lineage from the result to its base, a report that shows the metric."""

from __future__ import annotations

import re

import pytest

from sihe.core.errors import ConfigError, NotFound
from sihe.core.workspace import Workspace
from sihe.models.checkpoint import load_model
from sihe.training.recipes.chat import ChatTokenizer
from sihe.training.recipes.curve import draw_curves
from sihe.training.recipes.report import has_moved, write_report
from sihe.training.recipes.service import EXPERIMENT, RecipeService
from sihe.training.recipes.types import RecipeEvent
from support.tiny_recipes import tiny_recipe


def test_a_recipe_becomes_runs_versions_and_a_report(workspace: Workspace) -> None:
    config = tiny_recipe({"kind": "preference"}, metric="margin")
    events: list[tuple[int, RecipeEvent]] = []
    results = RecipeService(workspace).run(config, [4, 5], on_event=lambda seed, event: events.append((seed, event)))
    tracking = workspace.tracking
    assert [run.status for run in tracking.runs(EXPERIMENT)] == ["FINISHED", "FINISHED"]
    assert {seed for seed, _ in events} == {4, 5}

    first = results[0]
    edges = tracking.ancestors(first.model_version.key)
    assert (first.model_version.key, first.base_version.key) in edges
    assert (first.base_version.key, f"run:{first.run_id}") in edges
    folder = tracking.download(first.model_version)
    assert load_model(folder).config.hidden_size == 16
    assert ChatTokenizer.load(folder).prompt([{"role": "user", "content": "1+1"}])

    history = tracking.history(first.run_id, "2-preference/held_out/margin")
    assert [(point.step, point.value) for point in history] == first.curve("margin")
    assert [point.step for point in tracking.history(first.run_id, "1-sft/train/loss")] == [1, 2]

    assert first.curve("margin")[0] == (0, 0.0)
    page = write_report(config, results, made_on="here & now")
    assert "here &amp; now" in page
    assert page.count("<polyline") == 2 * len(first.measured[-1].metrics)
    moved = sum(has_moved(config, result) for result in results)
    assert f"it did for {moved} of 2 seeds" in page


def test_what_failed_goes_on_in_its_own_run(workspace: Workspace) -> None:
    config = tiny_recipe({"kind": "reward"}, metric="pair_accuracy")

    def fail(_seed: int, event: RecipeEvent) -> None:
        if event.stage == "2-reward":
            raise NotFound("patience", "mine")

    with pytest.raises(NotFound):
        RecipeService(workspace).run(config, on_event=fail)
    (failed,) = workspace.tracking.runs(EXPERIMENT)
    assert failed.status == "FAILED"
    (result,) = RecipeService(workspace).run(config)
    assert result.run_id == failed.id
    assert [run.status for run in workspace.tracking.runs(EXPERIMENT)] == ["FINISHED"]


def test_no_seed_is_no_run(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="at least one seed"):
        RecipeService(workspace).run(tiny_recipe(), [])


def test_a_chart_has_round_ticks_around_its_points() -> None:
    svg = draw_curves({"seed <0>": [(0, 0.13), (50, 0.87)]}, label='of "it"')
    assert re.findall(r'text-anchor="end">([\d.]+)</text>', svg) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert "<title>seed &lt;0&gt;</title>" in svg
    # 0.13 and 0.87 of the way up the 198 pixels between 0 (y 210) and 1 (y 12)
    assert f"{210 - 0.13 * 198:.1f}" in svg
    assert f"{210 - 0.87 * 198:.1f}" in svg


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0, 0.0], [-1e-9, 1e9], [5.0, float("nan")]])
def test_a_chart_of_anything_finite_can_be_drawn(values: list[float]) -> None:
    svg = draw_curves({"x": list(enumerate(values))}, label="x")
    assert svg.count("<polyline") == 1
    assert "nan" not in svg
    assert draw_curves({"x": [(0, float("nan"))]}, label="x") == ""
