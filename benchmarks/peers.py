"""`make peers ROOM=<room>`: environments for the peers that a room's benchmarks measure against.

A room lists them in `benchmarks/<room>/peers.txt` (pip's format), which becomes `benchmarks/peers/.venv-<room>`. Peers
that do not agree on one environment have a list each: `peers-<name>.txt` becomes `.venv-<room>-<name>`. Comments of a
list that begin with one of these words are steps:

    # constraints: none            the list decides the versions, not the project's constraints.txt
    # environment: KEY=VALUE       a variable while installing
    # afterwards: uninstall NAME   packages that must not stay

None of them ever becomes a dependency of the project. Run again, it installs what a changed list asks for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class PeerList:
    """One list of packages and the steps that its comments ask for."""

    path: Path
    constrained: bool
    environment: dict[str, str]
    unwanted: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The environment that it becomes."""
        name = self.path.stem.removeprefix("peers")
        return HERE / "peers" / f".venv-{self.path.parent.name}{name}"


def read_list(path: Path) -> PeerList:
    """The list at `path`. Raises `ValueError` for a step that is not known."""
    environment: dict[str, str] = {}
    unwanted: list[str] = []
    constrained = True
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            continue
        word, colon, rest = line.lstrip("# ").partition(": ")
        if not colon:
            continue
        if word == "constraints" and rest == "none":
            constrained = False
        elif word == "environment" and "=" in rest:
            key, _, value = rest.partition("=")
            environment[key] = value
        elif word == "afterwards" and rest.startswith("uninstall "):
            unwanted += rest.split()[1:]
        elif word in ("constraints", "environment", "afterwards"):
            raise ValueError(f"{path}: no such step: {line!r}")
    return PeerList(path, constrained, environment, tuple(unwanted))


def python_of(room: str, name: str | None = None) -> Path | None:
    """The interpreter of a room's peers (those of `peers-<name>.txt`); None before `make peers`."""
    python = HERE / "peers" / (f".venv-{room}" + (f"-{name}" if name else "")) / "bin" / "python"
    return python if python.exists() else None


def install(peers: PeerList) -> None:
    """Makes the environment of a list. Raises `CalledProcessError` where pip fails."""
    venv.create(peers.folder, with_pip=True)
    pip = [str(peers.folder / "bin" / "pip")]
    versions = ["-c", str(HERE.parent / "constraints.txt")] if peers.constrained else []
    surroundings = os.environ | peers.environment
    subprocess.run([*pip, "install", "-q", *versions, "-r", str(peers.path)], check=True, env=surroundings)
    if peers.unwanted:
        subprocess.run([*pip, "uninstall", "-q", "-y", *peers.unwanted], check=True)


def main() -> int:
    """Makes the environments of the rooms named, or of all."""
    rooms = sys.argv[1:] or sorted({path.parent.name for path in HERE.glob("*/peers*.txt")})
    for room in rooms:
        lists = sorted((HERE / room).glob("peers*.txt"))
        if not lists:
            print(f"benchmarks/{room} has no peers.txt: its peers are in the project's own environment")
        for path in lists:
            print(f"{path.relative_to(HERE.parent)}", flush=True)
            install(read_list(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
