"""`make bench ROOM=<room>`: runs a room's scripts (or all), then lists the claims, those that do not hold first.

Exits 0 when everything was measured, whatever holds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, format_claim

_OWN = {"__init__", "harness", "run", "peers"}


def main() -> int:
    """Runs the scripts; 1 when one of them could not be measured."""
    here = Path(__file__).parent
    rooms = sys.argv[1:] or sorted(path.name for path in here.iterdir() if path.is_dir() and list(path.glob("*.py")))
    failed, claims = [], []
    for room in rooms:
        scripts = [path for path in sorted((here / room).glob("*.py")) if path.stem not in _OWN]
        if not scripts:
            print(f"no benchmark in benchmarks/{room}", file=sys.stderr)
            return 2
        for script in scripts:
            print(f"== {room}/{script.stem}", flush=True)
            module = f"benchmarks.{room}.{script.stem}"
            if subprocess.run([sys.executable, "-m", module], check=False).returncode:
                failed.append(f"{room}/{script.stem}")
                continue
            result = RESULTS / room / f"{script.stem}.json"
            claims += json.loads(result.read_text())["claims"]
    print("\n== claims")
    for claim in sorted(claims, key=lambda claim: claim["holds"]):
        print(format_claim(claim))
    for name in failed:
        print(f"NOT MEASURED: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
