"""What it costs to import the package and to ask the command line for help."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.harness import alternate, at_most, print_table, report


def _seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Whole processes, alternating with a bare interpreter."""
    contenders = {
        "python -c pass": lambda: _seconds(sys.executable, "-c", "pass"),
        "import sihe": lambda: _seconds(sys.executable, "-c", "import sihe"),
        "sihe --help": lambda: _seconds(sys.executable, "-m", "sihe", "--help"),
        "sihe train --help": lambda: _seconds(sys.executable, "-m", "sihe", "train", "--help"),
    }
    for measure in contenders.values():
        measure()
    figures = alternate(contenders, repeats=11)
    print_table(figures, unit="s", baseline="python -c pass")
    middle = {name: statistics.median(values) for name, values in figures.items()}
    report(
        __file__,
        [
            at_most("import sihe, whole process", middle["import sihe"], unit="s", limit=0.15),
            at_most("sihe --help, whole process", middle["sihe --help"], unit="s", limit=0.3),
            at_most("sihe train --help, whole process", middle["sihe train --help"], unit="s", limit=0.3),
        ],
    )


if __name__ == "__main__":
    main()
