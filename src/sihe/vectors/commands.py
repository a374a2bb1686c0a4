"""`sihe vectors …`: collections from the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sihe.core.terminal import emit, say, workspace

if TYPE_CHECKING:
    from sihe.vectors.database import Database

app = typer.Typer(help="Durable collections of vectors, searched exactly.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("list")
def list_collections(as_json: Json = False) -> None:
    """List the collections with their sizes."""
    with _database() as database:
        emit([database.collection(name).info() for name in database.names()], as_json=as_json)


@app.command()
def create(
    name: str,
    dim: Annotated[int, typer.Option(help="Numbers in each vector.")],
    metric: Annotated[str, typer.Option(help="cosine, dot or l2.")] = "cosine",
    as_json: Json = False,
) -> None:
    """Create an empty collection."""
    from sihe.vectors.checks import check_metric

    with _database() as database:
        emit(database.create(name, dim, check_metric(metric)).info(), as_json=as_json)


@app.command()
def show(
    name: str,
    limit: Annotated[int, typer.Option(help="How many points to show.")] = 10,
    filter: Annotated[str | None, typer.Option(help="A filter as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Show a collection and its first points."""
    with _database() as database:
        collection = database.collection(name)
        page = collection.scroll(limit, filter=_object(filter, "--filter"))
        points = [{"id": point.id, "payload": point.payload} for point in page.points]
        info = collection.info()
    if as_json:
        emit({"collection": info, "points": points, "next": page.next}, as_json=True)
        return
    emit(info, as_json=False)
    if points:
        say("")
        emit(
            [{"id": point["id"], "payload": json.dumps(point["payload"], ensure_ascii=False)} for point in points],
            as_json=False,
        )


@app.command()
def search(
    name: str,
    vector: Annotated[str, typer.Argument(help="The vector as a JSON list, such as '[0.1, 0.9]'.")],
    k: Annotated[int, typer.Option(help="How many points to find.")] = 10,
    filter: Annotated[str | None, typer.Option(help="A filter as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Find the points nearest to a vector."""
    with _database() as database:
        hits = database.collection(name).search(_json(vector, "VECTOR"), k, _object(filter, "--filter"))
    emit(hits, as_json=as_json)


@app.command()
def drop(name: str) -> None:
    """Remove a collection and its files."""
    with _database() as database:
        database.drop(name)
    say(f"dropped {name}")


def _database() -> Database:
    from sihe.vectors.database import Database

    return Database(workspace().path("vectors"))


def _json(text: str, what: str) -> Any:
    from sihe.core.errors import InvalidInput

    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{what}: expected JSON, got {text!r} ({error})") from error


def _object(text: str | None, what: str) -> dict[str, Any] | None:
    from sihe.core.errors import InvalidInput

    value = None if text is None else _json(text, what)
    if value is not None and not isinstance(value, dict):
        raise InvalidInput(f"{what}: expected a JSON object, got {text!r}")
    return value
