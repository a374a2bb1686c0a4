"""`sihe predictor …`: predictive models on disk, looked at and registered."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sihe.core import terminal

if TYPE_CHECKING:
    from sihe.serving.predictive.types import TensorSpec

app = typer.Typer(no_args_is_help=True, help="Predictive models: scikit-learn, PyTorch and ONNX.")

_Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]
_Path = Annotated[Path, typer.Argument(help="A model's folder (model.json and its file), or an .onnx file.")]


@app.command()
def describe(path: _Path, as_json: _Json = False) -> None:
    """Show what a model takes and gives, after it has answered its example."""
    from sihe.serving.predictive.folder import describe as read
    from sihe.serving.predictive.registration import try_out

    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder_of(path, Path(scratch))
        found = read(folder)
        try_out(folder)
    if as_json:
        terminal.emit(found, as_json=True)
        return
    terminal.say(f"{found.platform}, {'rows are computed together' if found.batched else 'one request at a time'}")
    rows = [("input", *_row(spec)) for spec in found.inputs] + [("output", *_row(spec)) for spec in found.outputs]
    terminal.table(("", "name", "datatype", "shape", "labels"), rows)


@app.command()
def register(
    name: Annotated[str, typer.Argument(help="The model's name in the registry.")],
    path: _Path,
    alias: Annotated[str | None, typer.Option(help="An alias to point at the new version.")] = None,
    trust: Annotated[
        list[str] | None, typer.Option(metavar="TYPE", help="A type that a .skops file may build, if you know it.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Record a model as the next version of NAME, after it has answered its example. Then: sihe deploy create."""
    from sihe.serving.predictive.config import PredictiveConfig
    from sihe.serving.predictive.registration import register as record

    config = PredictiveConfig(trusted_types=tuple(trust or ()))
    with tempfile.TemporaryDirectory() as scratch, terminal.workspace() as workspace:
        version = record(workspace.tracking, name, _folder_of(path, Path(scratch)), config=config)
        if alias is not None:
            workspace.tracking.set_alias(name, alias, version.version)
    if as_json:
        terminal.emit({"name": name, "version": version.version, "alias": alias}, as_json=True)
    else:
        terminal.say(f"{name}@{version.version}" + (f" is {name}@{alias}" if alias else ""))


def _folder_of(path: Path, scratch: Path) -> Path:
    """The model's folder; one is made for a lone ONNX file."""
    if path.is_dir():
        return path
    from sihe.core.errors import InvalidInput, NotFound
    from sihe.serving.predictive.registration import save_onnx

    if not path.exists():
        raise NotFound("path", str(path))
    if path.suffix != ".onnx":
        raise InvalidInput(
            f"{path} is neither a model's folder nor an .onnx file: save the model with sihe.serving.predictive "
            "(save_sklearn, save_torch, save_onnx)"
        )
    save_onnx(path, scratch / "model")
    return scratch / "model"


def _row(spec: TensorSpec) -> tuple[str, str, str, str]:
    return spec.name, spec.datatype, str(list(spec.shape)), ", ".join(spec.labels)
