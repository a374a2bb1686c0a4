"""What the process of `serve.hot_swap` runs: a service under load whose model is exchanged again and again.

Three ways: the gateway, which loads the new version beside the old one and flips the route; and a service without one,
which stops its engine (at once, or after the answers that have begun), loads the new version and starts.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sihe.apps.coach.labs.hot_swap_load import Load, MemoryWatch
from sihe.apps.coach.labs.hot_swap_tally import Order, Tally, tally
from sihe.apps.coach.labs.kv_growth_ranks import resident_bytes
from sihe.core.settings import Settings
from sihe.core.workspace import Workspace
from sihe.models.checkpoint import save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.gateway.gateway import Gateway
from sihe.training.recipes.arithmetic import write_tokenizer

_NAME = "lab"
_M_MMAP_THRESHOLD, _PIECE_BYTES = -3, 64 * 1024  # glibc's malloc.h
_READY_S = 60.0
_CONTEXT = 128
_BATCH, _MOST_LOAD = 8, 0.5
_PROMPT = (2, 5, 6, 14, 7, 8)  # tokens are drawn from so few that what they are does not matter
_SETTINGS = EngineConfig(max_batch_size=16, token_budget=64, kv_cache_bytes=64 * 2**20)


@dataclass(frozen=True, slots=True)
class Versions:
    """Two versions of one model, what each answers alone, and how many answers a second one engine can give."""

    folders: Mapping[str, Path]
    alone: Mapping[str, tuple[int, ...]]
    request: GenerationRequest
    weight_bytes: int
    capacity_per_s: float


@dataclass(frozen=True, slots=True)
class Course:
    """How a service is driven: exchanges, arrivals, and the pauses before the first and after each exchange."""

    swaps: int
    rate_per_s: float
    calm_s: float
    between_s: float


def swap(
    rank: int,
    world_size: int,
    *,
    swaps: int,
    rate_per_s: float,
    layers: int,
    width: int,
    tokens: int,
    calm_s: float,
    between_s: float,
) -> dict[str, Any]:
    """What became of the requests in each way, and the memory that each took."""
    del rank, world_size
    _return_memory_at_once()
    with tempfile.TemporaryDirectory(prefix="sihe-lab-swap-") as name:
        versions = make_versions(Path(name), layers, width, tokens)
        # A service that cannot keep up when nothing is exchanged would show its queue, and not the exchange.
        rate_per_s = min(rate_per_s, _MOST_LOAD * versions.capacity_per_s)
        course = Course(swaps, rate_per_s, calm_s, between_s)
        found = {
            "beside": by_gateway(Path(name, "home"), versions, course),
            "drained": by_restart(versions, course, drain=True),
            "stopped": by_restart(versions, course, drain=False),
        }
    return {
        "ways": {key: {**run.tally.to_mapping(), "peak_bytes": run.peak_bytes} for key, run in found.items()},
        "one_bytes": found["beside"].steady_bytes - found["beside"].empty_bytes,
        "extra_bytes": {key: run.peak_bytes - run.steady_bytes for key, run in found.items()},
        "weight_bytes": versions.weight_bytes,
        "rate_per_s": rate_per_s,
        "capacity_per_s": versions.capacity_per_s,
    }


@torch.no_grad()
def make_versions(folder: Path, layers: int, width: int, tokens: int) -> Versions:
    """Two models of one shape with different weights, written out, and each one's answer to the one request."""
    config = ModelConfig(32, width, layers, width // 64, width // 64, 64, 4 * width, _CONTEXT)
    request = GenerationRequest(prompt=_PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True)
    folders, alone, size, capacity_per_s = {}, {}, 0, 0.0
    for version in (1, 2):
        name = f"{_NAME}@{version}"
        torch.manual_seed(version)
        model = Decoder(config)
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 * weight.shape[1] ** -0.5)  # wide, so that the two versions differ at once
        folders[name] = folder / f"version-{version}"
        save_model(model.bfloat16(), folders[name])
        write_tokenizer(folders[name])
        size = sum(weight.nbytes for weight in model.parameters())
        with Engine.load(folders[name], _SETTINGS, name=name) as engine:
            alone[name] = engine.submit(request).result().token_ids
            capacity_per_s = _answers_per_s(engine, request)
    return Versions(folders, alone, request, size, capacity_per_s)


def _answers_per_s(engine: Engine, request: GenerationRequest) -> float:
    """Answers a second while a batch of them is asked for at once."""
    start_s = time.perf_counter()
    for stream in [engine.submit(request) for _ in range(_BATCH)]:
        stream.result()
    return _BATCH / (time.perf_counter() - start_s)


@dataclass(frozen=True, slots=True)
class Run:
    """One way's outcome, and resident memory before there was a version, with one, and at most."""

    tally: Tally
    empty_bytes: int
    steady_bytes: int
    peak_bytes: int


def by_gateway(home: Path, versions: Versions, course: Course) -> Run:
    """Loads beside, warms, flips, drains, frees: what `sihe deploy alias` starts."""
    from prometheus_client import CollectorRegistry

    with Workspace(Settings(home=home)) as workspace:
        for folder in versions.folders.values():
            workspace.tracking.register_model(_NAME, folder)
        workspace.tracking.set_alias(_NAME, "live", 1)
        with Gateway(workspace, registry=CollectorRegistry()) as gateway:
            empty_bytes = _settled_bytes()
            gateway.deploy(_NAME, f"{_NAME}@live", settings=_SETTINGS)
            gateway.wait_ready(_NAME, timeout_s=_READY_S)

            def order(version: int) -> None:
                gateway.move_alias(_NAME, "live", version)
                gateway.wait_ready(_NAME, timeout_s=_READY_S)
                while len(gateway.route(_NAME).replicas()) > 1:  # the old one finishes what it has begun
                    time.sleep(0.005)

            return _drive(lambda: gateway.generate(_NAME, versions.request), order, versions, course, empty_bytes)


def by_restart(versions: Versions, course: Course, *, drain: bool) -> Run:
    """One engine at a time: stopped, with or without its answers, before the next one is loaded."""

    def load(version: int) -> Engine:
        name = f"{_NAME}@{version}"
        engine = Engine.load(versions.folders[name], _SETTINGS, name=name)
        engine.warm()
        return engine

    empty_bytes = _settled_bytes()
    held = [load(1)]

    def order(version: int) -> None:
        held[0].close(drain=drain)  # refuses whoever comes from here on
        held[0] = load(version)

    def ask() -> GenerationStream:
        return held[0].submit(versions.request)

    try:
        return _drive(ask, order, versions, course, empty_bytes)
    finally:
        held[0].close(drain=False)


def _drive(
    ask: Callable[[], GenerationStream],
    order: Callable[[int], None],
    versions: Versions,
    course: Course,
    empty_bytes: int,
) -> Run:
    """Sends requests, and orders one version after the other, each just after an answer has begun."""
    orders = []
    with Load(ask, course.rate_per_s) as load:
        load.wait_for_answer()
        time.sleep(course.calm_s)
        steady_bytes = _settled_bytes()
        with MemoryWatch() as memory:
            for number in range(course.swaps):
                version = 2 - number % 2
                name = f"{_NAME}@{version}"
                load.wait_for_answer()
                ordered_s = time.perf_counter()
                order(version)
                orders.append(Order(name, ordered_s, time.perf_counter()))
                load.wait_for_answer(name)
                time.sleep(course.between_s)
    return Run(tally(load.asked, orders, versions.alone), empty_bytes, steady_bytes, memory.peak_bytes)


def _return_memory_at_once() -> None:
    """Large pieces go back to the system when they are freed, so that resident memory is what is held.

    glibc would keep some of them for later, and a version that is gone would go on to be counted.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _PIECE_BYTES)


def _settled_bytes() -> int:
    gc.collect()
    return resident_bytes()
