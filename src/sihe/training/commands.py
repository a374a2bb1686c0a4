"""`sihe train`: run a configuration, list runs, show one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sihe.core import terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.progress import Progress

    from sihe.cluster.planner.comparison import Compared
    from sihe.training.types import TrainEvent, TrainRun

app = typer.Typer(help="Train a model, and see its runs.", no_args_is_help=True, rich_markup_mode=None)

_LINES = 10  # about so many lines of progress where there is no terminal to draw a bar on

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("run")
def run_training(
    config: Annotated[str, typer.Option(help="A YAML file, or the name of a preset (sihe train presets).")],
    dataset: Annotated[str | None, typer.Option(help="A data set: its name, name@version, or folder.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A training setting, such as max_steps=50.")
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Start over instead of continuing an interrupted run.")] = False,
    predict: Annotated[
        bool, typer.Option("--predict", help="Afterwards, time this machine and set the planner's prediction beside.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model; an interrupted run with the same settings and data is continued."""
    from sihe.training.presets.reader import load_config, parse_override
    from sihe.training.service import TrainingService

    overrides = dict(parse_override(item) for item in set_ or ())
    if dataset is not None:
        overrides["dataset"] = dataset
    resolved = load_config(config, overrides)
    with terminal.workspace() as opened, terminal.progress() as shown:
        result = TrainingService(opened).train(
            resolved, resume="never" if new else "auto", on_event=_narrator(shown, quiet=as_json)
        )
        version = result.model_version
        summary = {"run": result.run_id, "model": f"{version.name}@{version.version}", "steps": result.steps}
        summary |= {"loss": result.final_loss, "tokens_per_s": result.tokens_per_s, "restarts": result.restarts}
    compared = _compared(result.folder) if predict else []
    if as_json and predict:
        summary["predicted"] = [asdict(row) for row in compared]
    terminal.emit(summary | {"folder": result.folder}, as_json=as_json)
    if compared and not as_json:
        terminal.emit([asdict(row) for row in compared], as_json=False)


@app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 20, as_json: AsJson = False
) -> None:
    """The newest training runs. INTERRUPTED: the same `run` command continues it."""
    from sihe.training.service import TrainingService

    with terminal.workspace() as opened:
        runs = TrainingService(opened).runs(limit=limit)
        terminal.emit(runs if as_json else [_summary(run) for run in runs], as_json=as_json)


@app.command("show")
def show_run(run_id: str, as_json: AsJson = False) -> None:
    """One training run with its configuration."""
    from sihe.training.service import TrainingService

    with terminal.workspace() as opened:
        service = TrainingService(opened)
        run = service.run(run_id)
        folder = service.folder(run.id)
        terminal.emit(
            asdict(run) | {"folder": folder} if as_json else _summary(run) | {"folder": folder, **run.config},
            as_json=as_json,
        )


@app.command("export")
def export_checkpoint(run_id: str, step: int, as_json: AsJson = False) -> None:
    """Register the checkpoint of a step as a version of the run's model."""
    from sihe.training.service import TrainingService

    with terminal.workspace() as opened:
        version = TrainingService(opened).register_checkpoint(run_id, step)
        terminal.emit({"model": f"{version.name}@{version.version}", "step": step}, as_json=as_json)


@app.command("presets")
def list_presets(as_json: AsJson = False) -> None:
    """The configurations that ship with Sihe."""
    from sihe.training.presets.reader import preset_names

    terminal.emit(preset_names(), as_json=as_json)


def _compared(folder: Path) -> list[Compared]:
    from sihe.cluster.planner.measurement import measure_machine
    from sihe.training.prediction import predicted_beside_measured

    return predicted_beside_measured(folder, measure_machine())


def _summary(run: TrainRun) -> dict[str, Any]:
    values = {"id": run.id, "name": run.name, "status": run.status, "step": f"{run.step}/{run.max_steps}"}
    return values | {"loss": run.loss, "tokens_per_s": run.tokens_per_s, "started_at": run.started_at}


def _narrator(shown: Progress, *, quiet: bool) -> Callable[[TrainEvent], None]:
    """Tells what happens: a bar with loss and tokens/s, and a line for each thing that is not a step."""
    from sihe.cluster.types import RankFailed, RankHung, Restarting, StragglerSeen, WorkersChanged
    from sihe.training.types import (
        AttemptReady,
        CheckpointSkipped,
        RunOpened,
        StepDone,
        StepRejected,
        StepsSkipped,
    )

    task = shown.add_task("starting", total=None, note="")
    steps = 0

    def say(line: str) -> None:
        if not quiet:
            shown.console.print(line, markup=False, highlight=False)

    def narrate(event: TrainEvent) -> None:
        nonlocal steps
        match event:
            case RunOpened():
                verb = "continuing" if event.resumed else "training"
                say(f"{verb} run {event.run_id}: {event.num_parameters:,} parameters, {event.max_steps} steps")
                steps = event.max_steps
                shown.update(task, total=steps)
            case AttemptReady() if event.step:
                say(f"going on after step {event.step}, at sample {event.next_sample:,}")
            case StepDone():
                note = f"loss {event.loss:.4f}  {event.tokens_per_s:,.0f} tok/s"
                shown.update(task, completed=event.step, description=f"step {event.step}", note=note)
                if not shown.console.is_terminal and event.step % max(1, steps // _LINES) == 0:
                    say(f"step {event.step}/{steps}  {note}")
            case CheckpointSkipped():
                say(f"warning: checkpoint damaged ({event.reason}), moved to {event.path}")
            case StepRejected():
                say(f"step {event.step} not accepted: {event.reason}; back to the newest checkpoint")
            case StepsSkipped():
                say(f"samples {event.first_sample:,} to {event.next_sample - 1:,} are skipped from now on")
            case StragglerSeen():
                slow = f"{event.median_s:.3g} s a step, the others {event.others_median_s:.3g} s"
                say(f"warning: rank {event.rank} is slow: {slow} (median of {event.steps} steps)")
            case WorkersChanged():
                say(f"going on with {event.after} workers instead of {event.before}")
            case RankFailed() | RankHung():
                say(f"rank {event.rank} {event.reason}")
            case Restarting():
                say(f"restart {event.restart} of at most {event.max_restarts} in {event.delay_s:g} s")
            case _:
                pass

    return narrate
