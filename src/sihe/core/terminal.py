"""What every room's `commands.py` shares: the workspace of this call, tables or JSON, progress, errors in one line.

The root command (`sihe.cli`) stores the global flags; a room asks for `workspace()` inside a command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from sihe.core.workspace import Workspace

_flags: dict[str, Any] = {}


def set_flags(flags: Mapping[str, Any]) -> None:
    """Keeps the root command's flags (dotted settings) for `workspace`."""
    _flags.clear()
    _flags.update(flags)


def flag(key: str) -> Any:
    """The value of a global flag (dotted setting), or None."""
    return _flags.get(key)


def workspace(flags: Mapping[str, Any] | None = None) -> Workspace:
    """The workspace that flags, environment and file describe. A command's own `flags` win over the global ones."""
    from sihe.core import settings, telemetry
    from sihe.core.workspace import Workspace

    own = {key: value for key, value in (flags or {}).items() if value is not None}
    resolved = settings.load({**_flags, **own})
    telemetry.configure_logs(resolved.log.level, resolved.log.format)
    return Workspace(resolved)


def emit(value: Any, *, as_json: bool) -> None:
    """Prints a value: as one JSON document, or as text (a mapping as `key  value` lines, rows as a table)."""
    if as_json:
        sys.stdout.write(json.dumps(_plain(value), ensure_ascii=False, indent=2) + "\n")
        return
    plain = _plain(value)
    if isinstance(plain, list) and plain and isinstance(plain[0], dict):
        table(list(plain[0]), [list(row.values()) for row in plain])
    elif isinstance(plain, dict):
        width = max((len(str(key)) for key in plain), default=0)
        for key, item in plain.items():
            say(f"{key!s:<{width}}  {_cell(item)}")
    elif isinstance(plain, list):
        say("\n".join(_cell(item) for item in plain) if plain else "(none)")
    else:
        say(str(plain))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows under headings, to the width of the terminal."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        drawn.add_row(*(_cell(cell) for cell in row))
    Console(highlight=False, markup=False).print(drawn)


def say(line: str) -> None:
    """Prints one line to standard output at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on standard error (silent when that is no terminal)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as shown:
        yield shown


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    return "" if value is None else str(value)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, datetime | date):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value
