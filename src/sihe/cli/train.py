"""`sihe train` with the verbs that need training and serving together: recipes, whose rollouts the engine makes."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Annotated

import typer

from sihe.core import terminal
from sihe.training.commands import AsJson, app

if TYPE_CHECKING:
    from collections.abc import Callable

    from sihe.training.recipes.types import RecipeEvent

__all__ = ["app"]


@app.command("recipe")
def run_recipe(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe (sihe train recipes).")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, such as stages.1.beta=0.2.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How many, from the recipe's seed on.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run a post-training recipe, and write a report with the curve of its metric."""
    from sihe.cli.rollout import open_engine_rollout
    from sihe.core.files import write_file
    from sihe.training.presets.reader import parse_override
    from sihe.training.recipes.reader import load_recipe
    from sihe.training.recipes.report import has_moved, write_report
    from sihe.training.recipes.service import RecipeService

    config = load_recipe(recipe, dict(parse_override(item) for item in set_ or ()))
    with terminal.workspace() as opened:
        service = RecipeService(opened, open_rollout=open_engine_rollout)
        chosen = range(config.seed, config.seed + seeds)
        results = service.run(config, chosen, on_event=_ignore if as_json else _narrate(config.metric))
        machine = f"{platform.system()} {platform.machine()}, {opened.clock.now():%Y-%m-%d %H:%M UTC}"
        page = write_report(config, results, made_on=machine).encode()
        path = opened.path("reports", f"{config.name}.html")
        write_file(path, page)
        for result in results:
            opened.tracking.log_artifact(result.run_id, "report.html", page)
    rows = [
        {
            "seed": result.seed,
            "metric": config.metric,
            "before": result.curve(config.metric)[0][1],
            "after": result.curve(config.metric)[-1][1],
            "moved": has_moved(config, result),
            "seconds": round(result.seconds, 1),
            "model": f"{result.model_version.name}@{result.model_version.version}",
            "run": result.run_id,
        }
        for result in results
    ]
    if as_json:
        curves = [row | {"curve": result.curve(config.metric)} for row, result in zip(rows, results, strict=True)]
        terminal.emit({"report": path, "seeds": curves}, as_json=True)
    else:
        terminal.emit(rows, as_json=False)
        terminal.emit({"report": path}, as_json=False)


@app.command("recipes")
def list_recipes(as_json: AsJson = False) -> None:
    """The post-training recipes that ship with Sihe."""
    from sihe.training.recipes.reader import load_recipe, recipe_names

    recipes = [(name, load_recipe(name)) for name in recipe_names()]
    rows = [{"recipe": name, "metric": recipe.metric, "goal": recipe.goal} for name, recipe in recipes]
    terminal.emit(rows, as_json=as_json)


def _narrate(metric: str) -> Callable[[int, RecipeEvent], None]:
    """One line for each measurement."""
    from sihe.training.recipes.types import Measured

    def narrate(seed: int, event: RecipeEvent) -> None:
        if isinstance(event, Measured):
            ordered = sorted(event.metrics, key=lambda name: name != metric)
            figures = "  ".join(f"{name} {event.metrics[name]:.3f}" for name in ordered)
            terminal.say(f"seed {seed}  {event.stage}  step {event.step}  {figures}")

    return narrate


def _ignore(_seed: int, _event: RecipeEvent) -> None:
    """Nobody reads along."""
