"""`sihe deploy …`: what is deployed, and which version an alias points at. A running `sihe up` makes it so."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from sihe.core import terminal
from sihe.serving import traffic_commands

app = typer.Typer(no_args_is_help=True, help="Deployments that follow a model alias or version.")

_Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What clients send as model.")],
    target: Annotated[str, typer.Argument(help="model@alias, model@3, or model for its newest version.")],
    setting: Annotated[
        list[str] | None,
        typer.Option("--engine", metavar="KEY=VALUE", help="A setting of its model's kind, such as max_batch_size=8."),
    ] = None,
    replica: Annotated[
        list[str] | None,
        typer.Option(
            "--replica", metavar="KEY=VALUE", help="How many replicas, and where: max_replicas=4, backend.kind=ray."
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Deploy a model, or change what a deployment follows."""
    from sihe.serving.gateway.gateway import Gateway
    from sihe.serving.gateway.replicas.config import ReplicaConfig

    settings = dict(_setting(item) for item in setting or ())
    replicas = ReplicaConfig.from_mapping(_nested(dict(_setting(item) for item in replica))) if replica else None
    with terminal.workspace() as workspace:
        deployed = Gateway(workspace).deploy(name, target, settings=settings, replicas=replicas)
        terminal.emit(deployed, as_json=as_json)


@app.command("list")
def list_(as_json: _Json = False) -> None:
    """Show every deployment: what it follows, what serves, and why they differ if they do."""
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        found = Gateway(workspace).list()
    if as_json or not found:
        terminal.emit(found, as_json=as_json)
        return
    columns = ["name", "target", "state", "version", "wanted", "error"]
    if any(status.processes > 1 for status in found):
        columns.insert(3, "processes")
    terminal.table(columns, [[getattr(status, column) for column in columns] for status in found])


@app.command()
def remove(name: Annotated[str, typer.Argument(help="A deployment.")]) -> None:
    """Drain and free a deployment."""
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        Gateway(workspace).remove(name)
    terminal.say(f"removed {name}")


@app.command()
def alias(
    model: Annotated[str, typer.Argument(help="A registered model.")],
    name: Annotated[str, typer.Argument(help="The alias.")],
    version: Annotated[int, typer.Argument(help="The version that it shall point at.")],
) -> None:
    """Point an alias at a version; deployments that follow it swap under load."""
    from sihe.serving.gateway.gateway import Gateway

    with terminal.workspace() as workspace:
        Gateway(workspace).move_alias(model, name, version)
    terminal.say(f"{model}@{name} is version {version}")


app.command()(traffic_commands.arms)
app.command()(traffic_commands.arm)
app.command()(traffic_commands.canary)
app.command()(traffic_commands.promote)
app.command()(traffic_commands.rollback)
app.command()(traffic_commands.pause)
app.command()(traffic_commands.shadow)
app.command()(traffic_commands.shadows)
app.command()(traffic_commands.log)
app.command()(traffic_commands.logs)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """`{"backend.kind": "ray"}` → `{"backend": {"kind": "ray"}}`."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise typer.BadParameter(f"--replica gives {parent!r} as a value and as a group")
        place[last] = value
    return tree


def _setting(item: str) -> tuple[str, Any]:
    """`max_batch_size=8` → a key and a number, true or false, or text where it is none of these."""
    key, equals, value = item.partition("=")
    if not equals:
        raise typer.BadParameter(f"--engine and --replica take KEY=VALUE, got {item!r}")
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return key.strip(), kind(value)
    text = value.strip()
    return key.strip(), {"true": True, "false": False}.get(text, text)
