"""`sihe warmup`: compiles what engines on this processor need, so that the first one to load does not wait for it."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from sihe.core import terminal

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def warmup(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Compile the kernels of this processor; some 15 s once, and nothing the next time."""
    from sihe.serving.engine.compute.cpu.warm import compile_kernels

    began_s = time.monotonic()
    compile_kernels()
    terminal.emit({"kernels": "ready", "seconds": round(time.monotonic() - began_s, 2)}, as_json=as_json)
