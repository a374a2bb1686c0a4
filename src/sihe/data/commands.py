"""`sihe lake` and `sihe text`: tables with their versions, and files made into token data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sihe.core import terminal

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.progress import Progress as Display

    from sihe.core.workspace import Workspace
    from sihe.data.lake.lake import Lake
    from sihe.data.text.types import Progress

lake_app = typer.Typer(help="Tables of the data lake.", no_args_is_help=True, rich_markup_mode=None)
text_app = typer.Typer(help="Files to a token data set.", no_args_is_help=True, rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
_CELL_CHARACTERS = 60


# ---- lake -----------------------------------------------------------------------------------------------------------


@lake_app.command("list")
def list_tables(as_json: AsJson = False) -> None:
    """The tables, with their newest versions."""
    with terminal.workspace() as opened:
        lake = _lake(opened)
        rows = [{"table": name, "version": lake.table(name).version} for name in lake.names()]
    terminal.emit(rows, as_json=as_json)


@lake_app.command("show")
def show_table(
    name: str,
    limit: Annotated[int, typer.Option(min=1, help="How many versions, newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The history of a table."""
    with terminal.workspace() as opened:
        terminal.emit(_lake(opened).existing(name).history(limit), as_json=as_json)


@lake_app.command("read")
def read_table(
    name: str,
    as_of: Annotated[int | None, typer.Option("--as-of", help="The version; by default the newest.")] = None,
    columns: Annotated[list[str] | None, typer.Option("--column", help="A column; repeat for more.")] = None,
    where: Annotated[str | None, typer.Option(help="An SQL predicate, such as \"licence = 'MIT'\".")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many rows.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Rows of a table as of a version."""
    with terminal.workspace() as opened:
        found = _lake(opened).existing(name).read(as_of, columns, where=where)
    rows = found.slice(0, limit).to_pylist()
    if as_json:
        terminal.emit(rows, as_json=True)
        return
    terminal.emit([{key: _short(value) for key, value in row.items()} for row in rows], as_json=False)
    if found.num_rows > limit:
        terminal.say(f"… {found.num_rows - limit:,} more rows: --limit shows them")


@lake_app.command("append")
def append_file(
    name: str,
    file: Annotated[Path, typer.Argument(help="Rows as .parquet, .csv, .json or .jsonl.")],
    key: Annotated[str | None, typer.Option(help="An append with this key happens once.")] = None,
    as_json: AsJson = False,
) -> None:
    """Append a file's rows to a table; the first append creates it."""
    rows = _read_rows(file)
    with terminal.workspace() as opened:
        version = _lake(opened).table(name).append(rows, key=key)
    terminal.emit({"table": name, "version": version, "rows": rows.num_rows}, as_json=as_json)


def _lake(opened: Workspace) -> Lake:
    from sihe.data.lake.lake import Lake

    return Lake(opened.path("lake"))


def _read_rows(file: Path) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    from sihe.core.errors import InvalidInput, NotFound

    readers: dict[str, Callable[[Path], pa.Table]] = {
        ".parquet": parquet.read_table,
        ".csv": csv.read_csv,
        ".json": json.read_json,
        ".jsonl": json.read_json,
    }
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise InvalidInput(f"rows come as {', '.join(readers)}, got {str(file)!r}")
    if not file.is_file():
        raise NotFound("file", str(file))
    try:
        return reader(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidInput(f"{file} cannot be read as {file.suffix[1:]}: {error}") from error


def _short(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _CELL_CHARACTERS:
        return value[:_CELL_CHARACTERS].replace("\n", "⏎") + "…"
    return value.replace("\n", "⏎") if isinstance(value, str) else value


# ---- text -----------------------------------------------------------------------------------------------------------


@text_app.command("prepare")
def prepare(
    name: str,
    paths: Annotated[list[Path], typer.Argument(help="Files and folders.")],
    vocab_size: Annotated[int, typer.Option(help="Most tokens that the tokenizer may have.")] = 8192,
    held_out: Annotated[float, typer.Option(help="Share of the documents kept for evaluation.")] = 0.02,
    exclude: Annotated[list[str] | None, typer.Option(help="A pattern of names to pass over; repeat for more.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token data set of files; the same input and settings give the one that is there."""
    from sihe.data.text.service import TextService

    with terminal.workspace() as opened, terminal.progress() as display:
        made = TextService(opened).prepare(
            name, paths, vocab_size=vocab_size, held_out=held_out, exclude=exclude or (), on_progress=_shown_on(display)
        )
    terminal.emit({"dataset": made.key, **_plain(made)}, as_json=as_json)


@text_app.command("list")
def list_datasets(as_json: AsJson = False) -> None:
    """Every version of every data set, newest first."""
    from sihe.data.text.service import TextService

    with terminal.workspace() as opened:
        service = TextService(opened)
        rows = [
            {
                "dataset": f"{manifest.name}@{manifest.version}",
                "train_tokens": manifest.num_tokens("train"),
                "held_out_tokens": manifest.num_tokens("held_out"),
                "vocab_size": manifest.vocab_size,
                "created_at": manifest.created_at,
            }
            for name in service.names()
            for manifest in service.versions(name)
        ]
    terminal.emit(rows, as_json=as_json)


@text_app.command("show")
def show_dataset(
    reference: Annotated[str, typer.Argument(help="A data set: its name, name@version, or folder.")],
    dropped: Annotated[bool, typer.Option("--dropped", help="List the documents that were left out, and why.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a data set is made of. Its files are compared with their checksums."""
    from sihe.data.text.service import TextService

    with terminal.workspace() as opened:
        dataset = TextService(opened).open(reference)
    if dropped:
        terminal.emit(_dropped(dataset.folder), as_json=as_json)
        return
    manifest = dataset.manifest
    shown = {
        "dataset": manifest.key,
        "folder": dataset.folder,
        "checked": dataset.verification,
        "created_at": manifest.created_at,
        "made_from": list(manifest.lineage),
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "shards": {split: len(shards) for split, shards in manifest.splits.items()},
        **manifest.report,
        **manifest.settings,
    }
    terminal.emit(shown, as_json=as_json)


def _plain(made: Any) -> dict[str, Any]:
    shown = ("folder", "table_version", "is_reused", "counts", "skipped", "filtered", "seconds")
    return {name: getattr(made, name) for name in shown}


def _dropped(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    from sihe.data.text.preparation import REPORT_FILE

    columns = ["path", "fate", "rule", "value", "twin"]
    return [row for row in pq.read_table(folder / REPORT_FILE, columns=columns).to_pylist() if row["fate"] != "kept"]


def _shown_on(display: Display) -> Callable[[Progress], None]:
    from sihe.data.text.types import STAGES

    task = display.add_task("reading", total=len(STAGES), note="")

    def show(progress: Progress) -> None:
        part = progress.done / progress.total if progress.total else 0.0
        display.update(
            task, description=progress.stage, completed=STAGES.index(progress.stage) + part, note=progress.note[-40:]
        )

    return show
