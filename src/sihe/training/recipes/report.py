"""The page that shows what a recipe did: its metric before and after for every seed, and the curves in between."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sihe.training.recipes.config import RecipeConfig
from sihe.training.recipes.curve import colour, draw_curves
from sihe.training.recipes.types import RecipeResult

_STYLE = """
:root { --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --paper: #fcfcfd; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #b0b4ba; --line: #363a3f; --paper: #111113; } }
body { margin: 0 auto; max-width: 46rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 2.25rem 0 .6rem; }
p { color: var(--soft); } svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem 0 .4rem .75rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
i { display: inline-block; width: 1.2em; height: .25em; margin: 0 .4em .25em 0; border-radius: 2px; }
"""


def has_moved(config: RecipeConfig, result: RecipeResult) -> bool:
    """Whether the last stage moved the recipe's metric in the direction that it names."""
    curve = result.curve(config.metric)
    change = curve[-1][1] - curve[0][1]
    return change > 0 if config.goal == "up" else change < 0


def write_report(config: RecipeConfig, results: Sequence[RecipeResult], *, made_on: str) -> str:
    """A page of HTML that needs no other file. `made_on` names machine and time."""
    stage = escape(results[0].measured[-1].stage)
    rows = "".join(_row(config, number, result) for number, result in enumerate(results))
    charts = "".join(_chart(metric, results) for metric in _metrics(config, results))
    moved = sum(has_moved(config, result) for result in results)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(config.name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><style>{_STYLE}</style></head><body><main><h1>{escape(config.name)}</h1>'
        f"<p>{escape(made_on)}. {escape(config.metric)} should go {config.goal} in stage {stage}; it did for {moved} "
        f"of {len(results)} seeds. Measured on {config.task.held_out} held-out problems.</p>"
        f'<table><thead><tr><th scope="col">seed</th><th scope="col">before</th><th scope="col">after</th>'
        f'<th scope="col">seconds</th><th scope="col">model</th></tr></thead><tbody>{rows}</tbody></table>'
        f"{charts}</main></body></html>"
    )


def _row(config: RecipeConfig, number: int, result: RecipeResult) -> str:
    curve = result.curve(config.metric)
    version = f"{result.model_version.name}@{result.model_version.version}"
    return (
        f'<tr><td><i style="background:{colour(number)}"></i>{result.seed}</td><td>{curve[0][1]:.3f}</td>'
        f"<td>{curve[-1][1]:.3f}</td><td>{result.seconds:.0f}</td><td>{escape(version)}</td></tr>"
    )


def _metrics(config: RecipeConfig, results: Sequence[RecipeResult]) -> list[str]:
    """What the last stage measures, the recipe's metric first."""
    names = results[0].measured[-1].metrics
    return [config.metric, *(name for name in names if name != config.metric)]


def _chart(metric: str, results: Sequence[RecipeResult]) -> str:
    curves = {f"seed {result.seed}": result.curve(metric) for result in results}
    label = "; ".join(f"{name}: from {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in curves.items())
    return f"<h2>{escape(metric)}</h2>{draw_curves(curves, label=f'{metric} by step. {label}')}"
