"""`sihe runs`, `sihe models` and `sihe settings`: what tracking and settings hold."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sihe.core import terminal

runs_app = typer.Typer(help="Runs with their metrics, of every kind.", no_args_is_help=True, rich_markup_mode=None)
models_app = typer.Typer(
    help="Registered models, their versions, aliases and lineage.", no_args_is_help=True, rich_markup_mode=None
)
settings_app = typer.Typer(help="The resolved settings.", no_args_is_help=True, rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@runs_app.command("list")
def list_runs(
    experiment: Annotated[str | None, typer.Option(help="Only this experiment.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The newest runs."""
    with terminal.workspace() as opened:
        runs = opened.tracking.runs(experiment, limit=limit)
        terminal.emit(
            runs
            if as_json
            else [
                {"id": run.id, "experiment": run.experiment, "name": run.name, "status": run.status}
                | {key: run.metrics[key] for key in ("loss", "tokens_per_s") if key in run.metrics}
                for run in runs
            ],
            as_json=as_json,
        )


@runs_app.command("show")
def show_run(run_id: str, as_json: AsJson = False) -> None:
    """One run: parameters, last metrics, tags, artifacts."""
    with terminal.workspace() as opened:
        run = opened.tracking.run(run_id)
        artifacts = opened.tracking.artifacts(run_id)
        value: dict[str, Any] = {"id": run.id, "name": run.name, "experiment": run.experiment, "status": run.status}
        value |= {"started_at": run.started_at, "ended_at": run.ended_at, "params": dict(run.params)}
        value |= {"metrics": dict(run.metrics), "tags": dict(run.tags), "artifacts": artifacts}
        terminal.emit(value, as_json=as_json)


@models_app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Every model with its newest version and its aliases."""
    with terminal.workspace() as opened:
        rows = [
            {"name": name, "versions": len(opened.tracking.model_versions(name)), "aliases": aliases}
            for name, aliases in sorted(opened.tracking.models().items())
        ]
        terminal.emit(rows, as_json=as_json)


@models_app.command("show")
def show_model(reference: str, as_json: AsJson = False) -> None:
    """One version (`name`, `name@3` or `name@alias`) with everything that it was made from."""
    with terminal.workspace() as opened:
        version = opened.tracking.resolve(reference)
        lineage = [f"{child} ← {parent}" for child, parent in opened.tracking.ancestors(version.key)]
        terminal.emit(
            {"name": version.name, "version": version.version, "aliases": list(version.aliases)}
            | {"source": version.source, "run": version.run_id, "created_at": version.created_at}
            | {"tags": dict(version.tags), "lineage": lineage},
            as_json=as_json,
        )


@models_app.command("alias")
def move_alias(name: str, alias: str, version: int) -> None:
    """Point an alias at a version; deployments that follow it swap without losing a request."""
    with terminal.workspace() as opened:
        opened.tracking.set_alias(name, alias, version)
        terminal.say(f"{name}@{alias} is now version {version}")


@settings_app.callback()
def _settings() -> None:
    """The resolved settings."""  # a callback keeps `show` a verb although it is the only one


@settings_app.command("show")
def show_settings(as_json: AsJson = False) -> None:
    """Every setting as it is resolved, secrets masked, with its environment name."""
    from sihe.core import settings

    with terminal.workspace() as opened:
        public = opened.settings.public()
        rows = [
            {"key": key, "value": _dig(public, key), "environment": settings.environment_name(key), "meaning": meaning}
            for key, meaning in settings.known_keys().items()
        ]
        terminal.emit(rows, as_json=as_json)


def _dig(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
