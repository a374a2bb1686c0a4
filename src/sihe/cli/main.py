"""The `sihe` command: global flags, lazily loaded nouns, and errors as one line with an exit code.

0 is success, 1 failure, 2 misuse (a wrong flag or setting), 130 an interrupt.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from sihe.cli.nouns import NOUNS
from sihe.core import terminal
from sihe.core.errors import ConfigError, SiheError, TransientError
from sihe.version import __version__

if TYPE_CHECKING:
    from typer._click.core import Command, Context
    from typer._click.formatting import HelpFormatter


class _Nouns(TyperGroup):
    """The nouns of the house; a noun's module is imported only when it is called."""

    def list_commands(self, ctx: Context) -> list[str]:
        return list(NOUNS)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        noun = NOUNS.get(cmd_name)
        if noun is None:
            return None
        application = getattr(importlib.import_module(noun.module), noun.app)
        application._add_completion = False  # completion belongs to the root command
        application.rich_markup_mode = None  # plain help, without the time that rich takes to load
        command = get_command(application)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """The help lists the nouns without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, noun.help) for name, noun in NOUNS.items()])


app = typer.Typer(cls=_Nouns, rich_markup_mode=None, add_completion=False, no_args_is_help=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        terminal.say(f"sihe {__version__}")
        raise typer.Exit


@app.callback()
def root(
    home: Annotated[str | None, typer.Option(help="Folder that holds everything (default .sihe).")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as records.url=….")
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Sihe (四合): train, serve, retrieve and explain AI infrastructure, out of one folder."""
    flags: dict[str, Any] = {"home": home, "log.level": log_level}
    for item in set_ or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE, got {item!r}", key=key)
        flags[key.strip()] = value
    terminal.set_flags(flags)


def main() -> None:
    """Runs the command line; errors of the house become one line on standard error."""
    try:
        app()
    except SiheError as error:
        _fail(error, 2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - the last stop: a bug is reported, not swallowed
        _fail(error, 1, bug=True)


def _fail(error: BaseException, code: int, *, bug: bool = False) -> None:
    if _wants_traceback():
        import traceback

        traceback.print_exception(error)
    kind = f"internal error, {type(error).__name__}: " if bug else "error: "
    retry = " (try again)" if isinstance(error, TransientError) else ""
    sys.stderr.write(f"{kind}{error}{retry}\n")
    if bug and not _wants_traceback():
        sys.stderr.write("this is a bug in Sihe: run it again with --log-level debug for the trace, and report it\n")
    sys.exit(code)


def _wants_traceback() -> bool:
    return terminal.flag("log.level") == "debug" or os.environ.get("SIHE_LOG_LEVEL") == "debug"


if __name__ == "__main__":
    main()
