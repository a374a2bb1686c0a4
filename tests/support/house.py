"""The house rules as functions over a source tree, so that each can be shown to fail on a bad one."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "src" / "sihe"

MAX_LINES = 500
MAX_METHODS = 15
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager"}
# Which floor may hold which top-level room: the same list as the import contract, seen from the disk.
ROOMS = {"core", "models", "cluster", "data", "vectors", "training", "serving", "apps", "console", "cli"}
APPS = {"rag", "evaluation", "coach"}
# Exceptions, each with its reason.
LONG_FILES: dict[str, str] = {}
LARGE_CLASSES: dict[str, str] = {
    "core/tracking.py:Tracking": "one port to MLflow; runs, models and lineage share its client and its errors",
}
HEAVY = ("torch", "ray", "pandas", "mlflow", "transformers", "pyarrow", "fastapi", "sqlalchemy", "numba", "numpy")


def modules(source: Path) -> Iterator[tuple[str, ast.Module, str]]:
    """Relative path, syntax tree and text of every module."""
    for path in sorted(source.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield path.relative_to(source).as_posix(), ast.parse(text), text


def shape(source: Path) -> list[str]:
    """Rooms that are not in the plan, packages without a docstring, vague file names, code in a room's `__init__`."""
    found = [f"{name}: no such room in the plan" for name in _packages(source) - ROOMS]
    found += [f"apps/{name}: no such app in the plan" for name in _packages(source / "apps") - APPS]
    for name, tree, _ in modules(source):
        path = Path(name)
        if path.stem in VAGUE_NAMES:
            found.append(f"{name}: a file is a noun of the field, not {path.stem!r}")
        if path.parts[-2:-1] != ("versions",) and ast.get_docstring(tree) is None:
            found.append(f"{name}: a module says why it exists")
        if path.name == "__init__.py" and any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body):
            found.append(f"{name}: a package only names what its files define")
    return found


def size(source: Path) -> list[str]:
    """Files over 500 lines and public classes over 15 public methods, but for the listed exceptions."""
    found = []
    for name, tree, text in modules(source):
        lines = text.count("\n")
        if lines > MAX_LINES and name not in LONG_FILES:
            found.append(f"{name}: {lines} lines, over {MAX_LINES}")
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                methods = [
                    item.name
                    for item in node.body
                    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_")
                ]
                if len(methods) > MAX_METHODS and f"{name}:{node.name}" not in LARGE_CLASSES:
                    found.append(f"{name}: {node.name} has {len(methods)} public methods, over {MAX_METHODS}")
    return found


def exceptions_in_use(source: Path) -> list[str]:
    """Listed exceptions that are needed no more."""
    known = {name: text for name, _, text in modules(source)}
    found = [f"{name}: no longer over the limit" for name in LONG_FILES if known.get(name, "").count("\n") <= MAX_LINES]
    return found + [f"{name}: no such file" for name in LARGE_CLASSES if name.split(":")[0] not in known]


def swallowed_errors(source: Path) -> list[str]:
    """`except:` without a class, and `except Exception: pass`."""
    found = []
    for name, tree, _ in modules(source):
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id.endswith("Exception"))
                silent = all(isinstance(item, ast.Pass) for item in node.body)
                if node.type is None or (broad and silent):
                    found.append(f"{name}:{node.lineno}: an error is swallowed")
    return found


def public_names(source: Path) -> dict[str, list[str]]:
    """`__all__` of every package, read by importing it in a fresh interpreter from `source`'s parent."""
    packages = [
        ".".join(("sihe", *path.parent.relative_to(source).parts)).rstrip(".") for path in source.rglob("__init__.py")
    ]
    code = (
        "import importlib, json, sys\n"
        "print(json.dumps({name: sorted(getattr(importlib.import_module(name), '__all__', []))"
        " for name in sys.argv[1:]}))"
    )
    result = _python(code, *sorted(packages), source=source)
    names: dict[str, list[str]] = json.loads(result)
    return names


def heavy_imports(source: Path, *packages: str) -> list[str]:
    """Heavy libraries that importing `packages` loads."""
    code = "import importlib, sys\nfor name in sys.argv[2:]: importlib.import_module(name)\n"
    code += "print(*[name for name in sys.argv[1].split(',') if name in sys.modules])"
    return _python(code, ",".join(HEAVY), *packages, source=source).split()


def pure_modules(source: Path) -> list[str]:
    """Values, ports, errors and configuration: what other rooms read first."""
    stems = ("types", "ports", "errors", "config")
    paths = (path.relative_to(source).with_suffix("") for path in source.rglob("*.py") if path.stem in stems)
    return sorted(".".join(("sihe", *path.parts)) for path in paths)


def _python(code: str, *arguments: str, source: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env={"PYTHONPATH": str(source.parent), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )
    return done.stdout


def lint_imports(source: Path, configuration: Path) -> tuple[bool, str]:
    """Whether import-linter's contracts hold for the tree at `source`, and what it said."""
    code = "import sys; from importlinter.cli import lint_imports as lint\n"
    code += f"sys.exit(lint(config_filename={str(configuration)!r}, no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=source.parent,
        env={"PYTHONPATH": str(source.parent), "PATH": "/usr/bin:/bin", "NO_COLOR": "1"},
    )
    return done.returncode == 0, done.stdout + done.stderr


def _packages(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()}


if __name__ == "__main__":  # `make pin` writes the public names anew
    pinned = REPOSITORY / "tests" / "architecture" / "public_names.json"
    pinned.write_text(json.dumps(public_names(SOURCE), indent=2, sort_keys=True) + "\n")
