"""Freed memory is kept: measured as page faults of a process that makes and drops large blocks."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import resource, sys
import numpy as np
from sihe.core.allocator import keep_freed_memory

def churn():
    for _ in range(20):
        blocks = [np.ones(30 << 17) for _ in range(4)]

if sys.argv[1] == "keep" and not keep_freed_memory():
    print("unsupported")
    sys.exit()
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode: str) -> str:
    done = subprocess.run([sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_blocks_are_reused_without_page_faults() -> None:
    kept = _faults("keep")
    if kept == "unsupported":
        pytest.skip("the C library of this system is not glibc")
    assert int(kept) < 1000
    assert int(_faults("default")) > 5000
