"""`sihe eval`: figures of a model on held-out data."""

from __future__ import annotations

from typing import Annotated

import typer

from sihe.core import terminal

app = typer.Typer(help="Measure how good a model is.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Keeps `perplexity` a verb of its own while it is the only one."""


@app.command("perplexity")
def perplexity(
    model: Annotated[str, typer.Argument(help="A model (name, name@3, name@alias) or the path of its folder.")],
    dataset: Annotated[str, typer.Argument(help="A data set: its name, name@version, or folder.")],
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one window; by default the model's longest.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next; less gives more context.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """How well a model predicts the held-out split of a data set: nats, perplexity, bits per byte."""
    from sihe.apps.evaluation.service import EvaluationService

    with terminal.workspace() as opened, terminal.progress() as shown:
        task = shown.add_task("evaluating", total=None, note="")
        result = EvaluationService(opened).perplexity(
            model,
            dataset,
            sequence_length=sequence_length,
            stride=stride,
            on_progress=lambda done, total: shown.update(task, completed=done, total=total, note=f"{done:,} tokens"),
        )
    names = {"model": result.model, "dataset": result.dataset, "run": result.run_id}
    terminal.emit(names | result.figures, as_json=as_json)
