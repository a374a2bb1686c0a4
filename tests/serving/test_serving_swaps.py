"""Fifty swaps under load over HTTP: no request fails, a response has one version, and memory does not grow.

The figures are printed with  pytest -m slow -s.
"""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import numpy as np
import openai
import pytest

from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.gateway.gateway import Gateway

CACHE_BYTES = 32 * 2**20  # of each engine: one that was not freed shows
SETTINGS = EngineConfig(max_batch_size=8, token_budget=32, kv_cache_bytes=CACHE_BYTES)
PROMPT, TOKENS, STREAMS, SWAPS, SETTLED = "the lazy dog", 40, 8, 50, 10


def resident_bytes() -> int:
    gc.collect()
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS on this system")


def answer_of(folder: Path) -> str:
    with Engine.load(folder, SETTINGS) as engine:
        return engine.submit(GenerationRequest(prompt=PROMPT, max_tokens=TOKENS, temperature=0)).result(30).text


@pytest.mark.slow
def test_fifty_swaps_under_eight_streams(
    server_url: str, gateway: Gateway, model_folder: Path, other_folder: Path
) -> None:
    expected = {"tiny@1": answer_of(model_folder), "tiny@2": answer_of(other_folder)}
    gateway.deploy("tiny", "tiny@live", settings=SETTINGS)
    gateway.wait_ready("tiny", timeout_s=60)
    done = threading.Event()
    counts = {"tiny@1": 0, "tiny@2": 0}
    failures: list[str] = []

    def ask_until_done() -> None:
        with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
            while not done.is_set():
                try:
                    raw = client.completions.with_raw_response.create(
                        model="tiny", prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True
                    )
                    chunks = list(raw.parse())
                    version = raw.headers["x-sihe-model-version"]
                    if {chunk.system_fingerprint for chunk in chunks} != {version}:
                        failures.append(f"two versions in one response, of which the header says {version}")
                    if "".join(chunk.choices[0].text for chunk in chunks) != expected[version]:
                        failures.append(f"not the answer of {version}")
                    counts[version] += 1
                except Exception as error:
                    failures.append(repr(error))

    readers = [threading.Thread(target=ask_until_done) for _ in range(STREAMS)]
    for reader in readers:
        reader.start()
    resident: list[int] = []
    for swap in range(SWAPS):
        version = 2 - swap % 2
        gateway.move_alias("tiny", "live", version)
        assert gateway.wait_ready("tiny", timeout_s=120).version == version
        route = gateway.route("tiny")
        with route._changed:
            assert route._changed.wait_for(lambda route=route: len(route.replicas()) == 1, 60)
        resident.append(resident_bytes())
    done.set()
    for reader in readers:
        reader.join()
    settled = np.array(resident[SETTLED:]) / 2**20
    slope = float(np.polyfit(np.arange(settled.size), settled, 1)[0])
    sys.stdout.write(
        f"\n{SWAPS} swaps, {sum(counts.values())} responses {counts}, {len(failures)} failed; resident MB after swap "
        f"{SETTLED}: {settled[0]:.0f}, at the end {settled[-1]:.0f}, slope {slope * 1024:.0f} kB a swap\n"
    )
    assert failures == []
    assert min(counts.values()) > 0
    assert slope * 2**20 < CACHE_BYTES / 50  # a tenth of a leaked engine every five swaps would be seen
