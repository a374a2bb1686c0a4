"""The CPU's kernels as they are compiled for processors with narrower registers than this one's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import binding

WIDE = ("avx512", "avx10", "amx")


@pytest.mark.slow
@pytest.mark.parametrize(("way", "without"), [("avx-vnni", WIDE), ("avx2", (*WIDE, "avxvnni"))])
def test_kernels_are_right_in_narrower_registers(way: str, without: tuple[str, ...], tmp_path: Path) -> None:
    """All tests of the kernels, compiled anew for such a processor."""
    host = binding.get_host_cpu_features()
    if not host.get("avx2") or (way == "avx-vnni" and not host.get("avxvnni")):
        pytest.skip(f"the processor has no {way}")
    features = ",".join(f"{'+' if has and not name.startswith(without) else '-'}{name}" for name, has in host.items())
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    said = subprocess.run(
        [sys.executable, "-c", "from sihe.core import simd; print(simd.byte_product(), simd.vectors_in_registers())"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.split() == [way, "8"]
    tests = Path(__file__).with_name("test_serving_cpu.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
