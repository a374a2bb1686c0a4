"""The house keeps its own rules, and each rule is shown to fail on a bad example."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sihe.cli.nouns import NOUNS
from support import house

_CONTRACTS = tomllib.loads((house.REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
CONTRACTS = {contract["id"]: contract["name"] for contract in _CONTRACTS}
PINNED = Path(__file__).parent / "public_names.json"


@pytest.fixture
def bad_house(tmp_path: Path) -> Path:
    """A copy of the source that a test may spoil."""
    copy = tmp_path / "src" / "sihe"
    shutil.copytree(house.SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "content", "static"))
    return copy


# ---- imports ------------------------------------------------------------------------------------------------------


def test_floors_circles_and_pure_files_hold() -> None:
    holds, said = house.lint_imports(house.SOURCE, house.REPOSITORY / "pyproject.toml")
    assert holds, said


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("core/clock.py", "import sihe.training", "floors"),
        ("models/config.py", "import sihe.data", "floors"),
        ("training/config.py", "import sihe.serving", "floors"),
        ("core/ids.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sihe.cli", "floors"),
        ("attic/__init__.py", '"""A room that is on no floor."""', "floors"),
        ("apps/rag/types.py", "import sihe.apps.evaluation", "apps"),
        ("core/errors.py", "import sihe.core.records.engine", "circles"),
        ("serving/errors.py", "import fastapi", "pure"),
        ("models/config.py", "import torch", "pure"),
    ],
)
def test_a_broken_import_rule_is_seen(bad_house: Path, file: str, line: str, contract: str) -> None:
    path = bad_house / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    holds, said = house.lint_imports(bad_house, house.REPOSITORY / "pyproject.toml")
    assert not holds
    assert f"{CONTRACTS[contract]} BROKEN" in said


# ---- shape and size -----------------------------------------------------------------------------------------------


def test_rooms_have_their_shape() -> None:
    assert house.shape(house.SOURCE) == []


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("attic/__init__.py", '"""x"""', "attic: no such room"),
        ("apps/attic/__init__.py", '"""x"""', "apps/attic: no such app"),
        ("core/utils.py", '"""x"""', "core/utils.py"),
        ("core/silent.py", "x = 1", "core/silent.py"),
        ("core/__init__.py", '"""x"""\ndef f(): ...', "core/__init__.py"),
    ],
)
def test_a_bad_shape_is_seen(bad_house: Path, file: str, text: str, named: str) -> None:
    (bad_house / file).parent.mkdir(exist_ok=True)
    (bad_house / file).write_text(text)
    assert any(line.startswith(named) for line in house.shape(bad_house))


def test_files_and_classes_stay_small() -> None:
    assert house.size(house.SOURCE) == []
    assert house.exceptions_in_use(house.SOURCE) == []


def test_a_large_file_and_class_are_seen(bad_house: Path) -> None:
    methods = "\n".join(f"    def m{i}(self): ..." for i in range(16))
    (bad_house / "core" / "large.py").write_text(f"class Large:\n{methods}\n" + "x = 1\n" * 500)
    found = house.size(bad_house)
    assert any("516 lines" in line or "517 lines" in line for line in found)
    assert any("Large has 16" in line for line in found)


def test_no_error_is_swallowed() -> None:
    assert house.swallowed_errors(house.SOURCE) == []


@pytest.mark.parametrize("handler", ["except:\n    x = 1", "except Exception:\n    pass"])
def test_a_swallowed_error_is_seen(bad_house: Path, handler: str) -> None:
    (bad_house / "core" / "quiet.py").write_text(f"try:\n    x = 2\n{handler}\n")
    assert house.swallowed_errors(bad_house) != []


# ---- names and import time ----------------------------------------------------------------------------------------


def test_public_names_are_the_pinned_ones() -> None:
    """A change of the public surface is deliberate: `make pin` writes the file anew."""
    assert house.public_names(house.SOURCE) == json.loads(PINNED.read_text())


def test_a_new_public_name_is_seen(bad_house: Path) -> None:
    init = bad_house / "core" / "__init__.py"
    init.write_text(init.read_text() + "\n__all__ = [*__all__, 'surprise']\n")
    assert house.public_names(bad_house) != json.loads(PINNED.read_text())


def test_public_names_can_be_had() -> None:
    import importlib

    for package, names in json.loads(PINNED.read_text()).items():
        for name in names:
            assert hasattr(importlib.import_module(package), name), f"{package}.{name}"


def test_importing_a_room_loads_nothing_heavy() -> None:
    rooms = [name for name in json.loads(PINNED.read_text()) if "migrations" not in name]
    assert house.heavy_imports(house.SOURCE, *rooms) == []


def test_pure_files_load_nothing_heavy() -> None:
    loaded = house.heavy_imports(house.SOURCE, *house.pure_modules(house.SOURCE))
    assert set(loaded) <= {"numpy"}  # arrays are values too


def test_help_loads_nothing_heavy() -> None:
    assert house.heavy_imports(house.SOURCE, "sihe.cli.main") == []


def test_a_heavy_import_is_seen(bad_house: Path) -> None:
    init = bad_house / "core" / "__init__.py"
    init.write_text(init.read_text() + "\nimport numpy\n")
    assert "numpy" in house.heavy_imports(bad_house, "sihe.core")


# ---- documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cli.md", "settings.md"])
def test_reference_pages_are_fresh(name: str) -> None:
    from sihe.cli.reference import pages

    committed = (house.REPOSITORY / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert committed == pages()[name], "run  make reference"


def test_a_stale_reference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from sihe.cli import nouns, reference

    monkeypatch.setitem(nouns.NOUNS, "surprise", nouns.NOUNS["runs"])
    committed = (house.REPOSITORY / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert committed != reference.cli_page()


def test_every_noun_can_be_called_for_help() -> None:
    for noun in NOUNS:
        done = subprocess.run(
            [sys.executable, "-m", "sihe", noun, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Usage: "), noun


def test_paths_in_the_documents_exist() -> None:
    """Relative links and the file names of the map in ARCHITECTURE.md."""
    assert missing_links(house.REPOSITORY) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("[x](docs/none.md)")
    assert missing_links(tmp_path) == ["README.md: docs/none.md"]


def missing_links(root: Path) -> list[str]:
    found = []
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                found.append(f"{page.relative_to(root)}: {target}")
    return found
