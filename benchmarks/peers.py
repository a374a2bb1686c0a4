"""`make peers ROOM=<room>`: an environment for the peers that a room's benchmarks measure against.

A room lists them in `benchmarks/<room>/peers.txt` (pip's format); they never become dependencies of the project.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path


def main() -> int:
    """Creates `benchmarks/peers/.venv-<room>` and installs the room's list into it."""
    here = Path(__file__).parent
    for room in sys.argv[1:] or sorted(path.parent.name for path in here.glob("*/peers.txt")):
        listing = here / room / "peers.txt"
        if not listing.exists():
            print(f"benchmarks/{room} has no peers.txt: its peers are in the project's own environment")
            continue
        folder = here / "peers" / f".venv-{room}"
        venv.create(folder, with_pip=True)
        constraints = here.parent / "constraints.txt"
        subprocess.run(
            [str(folder / "bin/pip"), "install", "-q", "-c", str(constraints), "-r", str(listing)], check=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
