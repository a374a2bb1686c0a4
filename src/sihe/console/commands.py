"""`sihe up`: serves the console and every API on one address."""

from __future__ import annotations

from typing import Annotated

import typer

from sihe.core import terminal

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def up(
    host: Annotated[str | None, typer.Option(help="Address to listen on; by default server.host.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; by default server.port, 0: a free one.")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the console in a browser.")] = False,
) -> None:
    """Serve the console and the APIs until Ctrl-C."""
    from sihe.console.security import is_loopback
    from sihe.console.server import serve
    from sihe.serving.tenants import Access

    def ready(url: str) -> None:
        terminal.say(f"console     {url}")
        terminal.say(f"OpenAI API  {url}/v1")
        terminal.say("Ctrl-C stops it.")
        if open_browser:
            typer.launch(url)

    with terminal.workspace({"server.host": host, "server.port": port}) as workspace:
        settings = workspace.settings.server
        if not is_loopback(settings.host) and Access(workspace).is_open():
            typer.echo(
                f"warning: {settings.host} can be reached from other machines and no key is asked for: "
                "make one with  sihe keys create",
                err=True,
            )
        try:
            serve(workspace, on_ready=ready)
        except KeyboardInterrupt:  # the way to stop it: no failure
            terminal.say("stopped")
