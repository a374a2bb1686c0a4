"""All contenders on a lesser processor than this one: the variables that keep each to fewer instructions."""

from __future__ import annotations

from llvmlite import binding

from benchmarks.serving.contenders.pool import Entry

INSTRUCTIONS = ("avx2", "avx-vnni")
"""avx2: processors of 2013 and after; avx-vnni: with products of bytes, as most laptops since 2021."""


def environment_of(instructions: str) -> dict[str, str]:
    """Variables for our kernels (Numba), torch, oneDNN, MKL and CTranslate2; what has none is compiled: `peer_for`.

    Raises `ValueError` where this processor lacks the instructions.
    """
    host = binding.get_host_cpu_features()
    left_out = ("avx512", "avx10", "amx") + (("avxvnni",) if instructions == "avx2" else ())
    if not host.get("avx2") or (instructions == "avx-vnni" and not host.get("avxvnni")):
        raise ValueError(f"this processor has no {instructions}")
    features = (f"{'+' if has and not name.startswith(left_out) else '-'}{name}" for name, has in host.items())
    return {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(features),
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": {"avx2": "AVX2", "avx-vnni": "AVX2_VNNI"}[instructions],
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "CT2_FORCE_CPU_ISA": "AVX2",
    }


def peer_for(entry: Entry, instructions: str) -> Entry | None:
    """The same peer compiled for these instructions; None where it cannot be kept to them (vLLM)."""
    if entry.environment == "vllm":
        return None
    if entry.environment == "llama":
        return Entry(entry.module, entry.precision, f"llama-{instructions}")
    return entry
