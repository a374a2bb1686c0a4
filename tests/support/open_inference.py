"""A server of the Open Inference Protocol over real models, and one that waits until it is told to answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import gevent
import numpy as np
import torch
import tritonclient.http as triton
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry

from sihe.core.errors import NotFound, SiheError
from sihe.serving.deadlines import Deadline
from sihe.serving.errors import EngineClosed, NotReady
from sihe.serving.exchange import Answer, Question
from sihe.serving.predictive.api import error_response, router
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.metrics import PredictiveMetrics, PredictorMetrics
from sihe.serving.predictive.predictor import Predictor
from sihe.serving.predictive.registration import save_onnx, save_sklearn, save_torch
from sihe.serving.predictive.types import Array, ModelDescription, TensorSpec
from support.http_server import serving
from support.predictive_models import Scale, classifier, features, matmul_onnx, text_onnx

T = TypeVar("T")


class Gate:
    """A backend that waits until it is opened, and fails on negative numbers."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.rows: list[int] = []

    def run(self, inputs: Mapping[str, Array], outputs: frozenset[str]) -> Mapping[str, Array]:
        array: Any = inputs["x"]
        self.rows.append(array.shape[0])
        self.entered.release()
        assert self.open.wait(30)
        if (array < 0).any():
            raise ArithmeticError("below zero")
        return {"y": array, "nan": np.full(array.shape, np.nan, np.float32)}

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Status:
    name: str
    version: int | None
    error: str | None = None


@dataclass
class Shelf:
    """What serves, by name: the least that the routes need."""

    held: dict[str, Any] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def served(self) -> tuple[Status, ...]:
        there = [Status(name, int(served.version)) for name, served in sorted(self.held.items())]
        return (*there, *(Status(name, None, why) for name, why in self.broken.items()))

    def route(self, name: str) -> Held:
        if name not in self.held and name not in self.broken:
            raise NotFound("deployment", name)
        return Held(self, name)

    def turn(self, name: str, **_: object) -> Straight:
        return Straight(self.route(name))

    def aside(self, name: str, **_: object) -> Straight:
        return Straight(self.route(name))


@dataclass
class Straight:
    """The way of a request where there are no arms and no other replicas."""

    held: Held
    arm: str = "stable"
    deadline: Deadline | None = None
    bound: Deadline | None = None
    has_own_limit: bool = False
    question: Question | None = None
    is_heard: bool = False

    def start(self, work: Callable[[Any], T], *, block: bool = True) -> T:
        return self.held.call(work)

    def whole(self, work: Callable[[Any], T]) -> T:
        return self.start(work)

    def finished(self, answer: Answer | None = None) -> None:
        """It is the end."""

    def failed(self, error: BaseException) -> bool:
        return isinstance(error, EngineClosed)

    def left(self) -> None:
        """It is the end."""

    def shown(self, error: BaseException) -> BaseException:
        return error


@dataclass(frozen=True)
class Held:
    shelf: Shelf
    name: str

    def call(self, work: Callable[[Any], T]) -> T:
        if self.name in self.shelf.broken:
            raise NotReady(self.name, self.shelf.broken[self.name])
        return work(self.shelf.held[self.name])


@dataclass(frozen=True)
class House:
    """A server with its models and metrics."""

    url: str
    shelf: Shelf
    registry: CollectorRegistry

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"sihe_predictive_{name}", labels)


@contextlib.contextmanager
def opened_house(root: Path) -> Iterator[House]:
    """A server over one model of each kind, whose files are written to `root`."""
    save_sklearn(classifier(), root / "iris", example=features(2))
    save_torch(Scale(), root / "scale", example={"x": torch.ones(2, 3), "y": torch.ones(2, 3)}, outputs=("z", "total"))
    save_onnx(matmul_onnx(root / "m.onnx", factor=3.0), root / "graph")
    save_onnx(text_onnx(root / "t.onnx"), root / "echo")
    linear = torch.nn.Linear(3, 2).to(torch.bfloat16)
    save_torch(linear, root / "half", example={"input": torch.ones(2, 3).to(torch.bfloat16)})
    registry = CollectorRegistry()
    metrics = PredictiveMetrics.on(registry)
    shelf = Shelf()
    for name in ("iris", "scale", "graph", "echo", "half"):
        shelf.held[name] = Predictor.load(root / name, name=f"{name}@3", observer=PredictorMetrics(metrics, name, 3))
    app = FastAPI()
    app.include_router(router(shelf))

    @app.exception_handler(SiheError)
    def failed(request: Request, error: SiheError) -> Any:
        return error_response(error)

    with serving(app) as url:
        yield House(url, shelf, registry)
    for predictor in shelf.held.values():
        predictor.close()


@contextlib.contextmanager
def gated(house: House) -> Iterator[Gate]:
    """A model under the name `gate`, with room for four waiting requests."""
    backend = Gate()
    description = ModelDescription(
        "onnx_onnxv1",
        "m",
        (TensorSpec("x", "FP32", (-1, 1)),),
        (TensorSpec("y", "FP32", (-1, 1)), TensorSpec("nan", "FP32", (-1, 1))),
    )
    config = PredictiveConfig(max_waiting=4, max_delay_ms=0)
    example: dict[str, Any] = {"x": np.zeros((1, 1), np.float32)}
    metrics = PredictorMetrics(PredictiveMetrics.on(house.registry), "gate", 1)
    with Predictor(backend, description, config, name="gate@1", example=example, observer=metrics) as predictor:
        house.shelf.held["gate"] = predictor
        yield backend
        backend.open.set()
        del house.shelf.held["gate"]


def given(name: str, array: Any, *, datatype: str | None = None, binary: bool = True) -> Any:
    kind = datatype or (triton.InferInput and {"f": "FP32", "d": "FP64", "O": "BYTES"}[array.dtype.char])
    return triton.InferInput(name, list(array.shape), kind).set_data_from_numpy(array, binary_data=binary)


def floats(*rows: list[float]) -> Any:
    return np.array(rows, np.float32)


def is_inside(gate: Gate) -> None:
    """Returns when the model computes; lets the client's greenlets send meanwhile."""
    while not gate.entered.acquire(blocking=False):
        gevent.sleep(0)


def all_wait(house: House, count: int) -> None:
    """Returns when so many requests are in the queue; lets the client's greenlets send meanwhile."""
    while len(house.shelf.held["gate"]._queue) < count:
        gevent.sleep(0)
