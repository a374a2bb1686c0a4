"""How the process of a rank ends: with its exit code, what it printed, and without the end of the interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

RANK = """
import atexit, os, sys
from sihe.cluster.launchers.rank import supervised

atexit.register(os.abort)  # as a thread of foreign code that comes back to an interpreter which ends

def main():
    sys.stdout.write("said")
    {last}

supervised(main)
"""


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("pass", 0),
        ("raise SystemExit", 0),
        ("raise SystemExit(75)", 75),
        ("raise SystemExit('in words')", 1),
        ("raise ValueError('wrong')", 1),
    ],
)
def test_a_rank_ends_with_its_code_and_nothing_after(last: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RANK.format(last=last)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, "said")
    assert ("ValueError: wrong" in done.stderr) == ("ValueError" in last)
    assert ("in words" in done.stderr) == ("in words" in last)
