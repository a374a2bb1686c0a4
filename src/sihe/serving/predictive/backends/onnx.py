"""ONNX models, run by onnxruntime on the CPU (or on CUDA where its build has it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sihe.core.errors import CorruptData, InvalidInput
from sihe.core.lazy import require
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.datatypes import as_objects, as_texts
from sihe.serving.predictive.types import Array, DataType, ModelDescription, TensorSpec

EXTRA = "predictive"
_TYPES: dict[str, DataType] = {
    "tensor(bool)": "BOOL", "tensor(string)": "BYTES",
    "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32", "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32", "tensor(int64)": "INT64",
    "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
}  # fmt: skip


class OnnxBackend:
    """An inference session."""

    def __init__(self, session: Any, description: ModelDescription) -> None:
        self._session = session
        self._order = [spec.name for spec in description.outputs]
        self._specs = {spec.name: spec for spec in (*description.inputs, *description.outputs)}

    @classmethod
    def load(cls, path: Path, description: ModelDescription, config: PredictiveConfig) -> OnnxBackend:
        """The session of a file. Raises `CorruptData` when it is not the model described, or `MissingExtra`."""
        session = _open(path, threads=config.threads)
        for what, specs, nodes in (
            ("input", description.inputs, session.get_inputs()),
            ("output", description.outputs, session.get_outputs()),
        ):
            graph = {spec.name: spec for spec in _specs(nodes)}
            for spec in specs:
                if spec.name not in graph or graph[spec.name].datatype != spec.datatype:
                    has = ", ".join(f"{name} {found.datatype}" for name, found in graph.items())
                    raise CorruptData(path, f"it has no {what} {spec.name!r} {spec.datatype}; it has {has}")
            missing = graph.keys() - {spec.name for spec in specs} if what == "input" else set()
            if missing:
                raise CorruptData(path, f"it also needs the input {min(missing)!r}, which is not described")
        return cls(session, description)

    def run(self, inputs: Mapping[str, Array], outputs: frozenset[str]) -> Mapping[str, Array]:
        """Runs the parts of the graph that the wanted outputs need."""
        names = [name for name in self._order if name in outputs]
        feed = {name: self._fed(name, array) for name, array in inputs.items()}
        made = self._session.run(names, feed)
        return {
            name: as_objects(array) if self._specs[name].datatype == "BYTES" else np.asarray(array)
            for name, array in zip(names, made, strict=True)
        }

    def close(self) -> None:
        """Lets the session go."""
        self._session = None

    def _fed(self, name: str, array: Array) -> Array:
        if self._specs[name].datatype != "BYTES":
            return np.ascontiguousarray(array)
        return as_texts(array, name)


def describe_graph(path: Path) -> ModelDescription:
    """What the graph itself says. It is batched when every tensor's first dimension is free.

    Free dimensions with names must then have one name, so that a sequence length is not taken for a batch.
    """
    session = _open(path, threads=1)
    nodes = [*session.get_inputs(), *session.get_outputs()]
    firsts = [node.shape[0] if node.shape else 0 for node in nodes]
    names = {first for first in firsts if isinstance(first, str)}
    batched = all(first is None or isinstance(first, str) for first in firsts) and len(names) <= 1
    return ModelDescription(
        platform="onnx_onnxv1",
        file=path.name,
        inputs=_specs(session.get_inputs()),
        outputs=_specs(session.get_outputs()),
        batched=batched,
    )


def _open(path: Path, *, threads: int | None) -> Any:
    runtime = require("onnxruntime", extra=EXTRA)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only: they are raised as well
    # Its threads would burn their cores while they wait for the next batch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(str(path), options, providers=_providers(runtime))
    except Exception as error:
        raise CorruptData(path, f"onnxruntime cannot load it: {error}") from error


def _providers(runtime: Any) -> list[str]:
    there = runtime.get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]


def _specs(nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for node in nodes:
        datatype = _TYPES.get(node.type)
        if datatype is None:
            raise InvalidInput(
                f"tensor {node.name!r} is a {node.type}, which cannot be served: let the graph cast it "
                "(a classifier of scikit-learn: export it with zipmap=False)"
            )
        shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
        specs.append(TensorSpec(node.name, datatype, shape))
    return tuple(specs)
