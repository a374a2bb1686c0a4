"""A predictive model's folder: `model.json` beside the file that a library loads, and an example request.

    model.json      {"platform": "sklearn_skops", "file": "model.skops", "batched": true,
                     "inputs":  [{"name": "input", "datatype": "FP64", "shape": [-1, 4]}],
                     "outputs": [{"name": "label", "datatype": "INT64", "shape": [-1]}, …]}
    example.json    {"inputs": [{"name": "input", "datatype": "FP64", "shape": [1, 4], "data": […]}]}

`model.json` may leave out `inputs` and `outputs` for ONNX, or be absent where the only file is `model.onnx`: the graph
says them. Pickles are refused by name: loading one runs whatever program it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sihe.core.errors import CorruptData, InvalidInput, NotFound
from sihe.core.files import write_file
from sihe.serving.engine.memory import available_bytes
from sihe.serving.errors import NoMemory
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.datatypes import check_shape, datatype_of, from_json, numpy_type, to_json
from sihe.serving.predictive.ports import Backend
from sihe.serving.predictive.types import Array, ModelDescription, TensorSpec

DESCRIPTION = "model.json"
EXAMPLE = "example.json"
_ONNX = "model.onnx"
_PICKLES = (".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle", ".pth", ".pt", ".bin")
_COPIES = 2  # of a file, while a library reads it and builds the model from it
_MAX_BYTES = 8 * 2**20  # of either JSON file
_KEYS = {"platform", "file", "batched", "inputs", "outputs", "made_with"}


def is_predictive(folder: Path) -> bool:
    """Whether the folder holds a predictive model."""
    return (folder / DESCRIPTION).is_file() or (folder / _ONNX).is_file()


def describe(folder: Path) -> ModelDescription:
    """What the folder's model takes and gives. Raises `CorruptData`, `NotFound`, `InvalidInput`, `MissingExtra`."""
    path = folder / DESCRIPTION
    if not path.is_file():
        if (folder / _ONNX).is_file():
            return _of_onnx(folder, {"platform": "onnx_onnxv1", "file": _ONNX})
        pickles = sorted(found.name for found in folder.glob("*") if found.suffix in _PICKLES)
        if pickles:
            raise _is_pickle(folder / pickles[0])
        raise NotFound("file", str(path), hint="save the model with save_sklearn, save_torch or save_onnx")
    values = _read(path)
    unknown = sorted(values.keys() - _KEYS)
    if unknown:
        raise CorruptData(path, f"unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
    file = values.get("file")
    if isinstance(file, str) and Path(file).suffix in _PICKLES:
        raise _is_pickle(folder / file)
    try:
        if values.get("platform") == "onnx_onnxv1" and not {"inputs", "outputs"} <= values.keys():
            return _of_onnx(folder, values)
        return ModelDescription(
            platform=_given(values, "platform", str),
            file=_given(values, "file", str),
            inputs=_specs(values, "inputs"),
            outputs=_specs(values, "outputs"),
            batched=_given(values, "batched", bool) if "batched" in values else True,
            made_with=_given(values, "made_with", dict) if "made_with" in values else None,
        )
    except InvalidInput as error:
        raise CorruptData(path, str(error)) from error


def write_description(folder: Path, description: ModelDescription, example: Mapping[str, Array]) -> None:
    """Writes `model.json` and `example.json`."""
    values: dict[str, Any] = {"platform": description.platform, "file": description.file}
    values["batched"] = description.batched
    for what, specs in (("inputs", description.inputs), ("outputs", description.outputs)):
        values[what] = [
            {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
            | ({"labels": list(spec.labels)} if spec.labels else {})
            for spec in specs
        ]
    if description.made_with:
        values["made_with"] = dict(description.made_with)
    tensors = [
        {"name": spec.name, "datatype": spec.datatype, "shape": list(example[spec.name].shape)}
        | {"data": to_json(example[spec.name], spec.datatype, spec.name)}
        for spec in description.inputs
    ]
    write_file(folder / EXAMPLE, orjson.dumps({"inputs": tensors}) + b"\n")
    write_file(folder / DESCRIPTION, orjson.dumps(values, option=orjson.OPT_INDENT_2) + b"\n")


def example_of(folder: Path, description: ModelDescription) -> dict[str, Array]:
    """A request that the model can answer: `example.json`, or zeros (empty text) where there is none."""
    path = folder / EXAMPLE
    if not path.is_file():
        return {spec.name: _zeros(spec) for spec in description.inputs}
    try:
        given = {item["name"]: item for item in _read(path)["inputs"]}
        example = {}
        for spec in description.inputs:
            shape = check_shape(given[spec.name]["shape"], spec.name)
            example[spec.name] = from_json(given[spec.name]["data"], spec.datatype, shape, spec.name)
            if not spec.takes(shape):
                raise InvalidInput(f"the model takes {spec.name!r} of shape {list(spec.shape)}, not {list(shape)}")
    except (InvalidInput, KeyError, TypeError) as error:
        raise CorruptData(path, f"it is no example of this model: {error}", hint="remove it, or save anew") from error
    return example


def open_backend(folder: Path, description: ModelDescription, config: PredictiveConfig) -> Backend:
    """The model in memory, by the library of its platform. Raises what is wrong with it, `NoMemory`, `MissingExtra`."""
    path = folder / description.file
    if not path.is_file():
        raise NotFound("file", str(path), hint=f"{DESCRIPTION} names it")
    _check_memory(path)
    if description.platform == "sklearn_skops":
        from sihe.serving.predictive.backends.sklearn import SklearnBackend

        return SklearnBackend.load(path, description, config)
    if description.platform == "pytorch_export":
        from sihe.serving.predictive.backends.pytorch import TorchBackend

        return TorchBackend.load(path, description)
    from sihe.serving.predictive.backends.onnx import OnnxBackend

    return OnnxBackend.load(path, description, config)


def _check_memory(path: Path) -> None:
    """Refuses a model while the system could still kill the process for it, beside those that serve."""
    needed, available = _COPIES * path.stat().st_size, available_bytes()
    if needed > available:
        raise NoMemory(
            path.name,
            needed_bytes=needed,
            available_bytes=available,
            hint="remove another deployment first, or serve it on a larger machine",
        )


def tensor_spec(name: str, array: Array, *, batched: bool, labels: Sequence[str] = ()) -> TensorSpec:
    """What an example says of a tensor: its first dimension may vary where rows are batched."""
    shape = (-1, *array.shape[1:]) if batched else array.shape
    return TensorSpec(name, datatype_of(array), shape, tuple(labels))


def _of_onnx(folder: Path, values: Mapping[str, Any]) -> ModelDescription:
    from sihe.serving.predictive.backends.onnx import describe_graph

    file = _given(values, "file", str)
    if not (folder / file).is_file():
        raise NotFound("file", str(folder / file), hint=f"{DESCRIPTION} names it")
    found = describe_graph(folder / file)
    batched = _given(values, "batched", bool) if "batched" in values else found.batched
    return ModelDescription(
        platform="onnx_onnxv1",
        file=file,
        inputs=_specs(values, "inputs") if "inputs" in values else found.inputs,
        outputs=_specs(values, "outputs") if "outputs" in values else found.outputs,
        batched=batched,
    )


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_BYTES:
        raise CorruptData(path, f"it has more than {_MAX_BYTES} bytes")
    try:
        values = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise CorruptData(path, f"it is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise CorruptData(path, "it must hold one JSON object")
    return values


def _specs(values: Mapping[str, Any], key: str) -> tuple[TensorSpec, ...]:
    specs = []
    for item in _given(values, key, list):
        if not isinstance(item, dict) or item.keys() - {"name", "datatype", "shape", "labels"}:
            raise InvalidInput(f"{key}: a tensor has name, datatype, shape and perhaps labels, got {item!r:.100}")
        labels = item.get("labels", [])
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise InvalidInput(f"{key}: labels must be strings, got {labels!r:.100}")
        name, shape = _given(item, "name", str), _given(item, "shape", list)
        specs.append(TensorSpec(name, _given(item, "datatype", str), tuple(shape), tuple(labels)))
    return tuple(specs)


def _given(values: Mapping[str, Any], key: str, kind: type) -> Any:
    value = values.get(key)
    if not isinstance(value, kind):
        raise InvalidInput(f"{key!r} must be a {kind.__name__}, got {value!r:.100}")
    return value


def _zeros(spec: TensorSpec) -> Array:
    shape = tuple(max(1, size) if size else 0 for size in spec.shape)
    if spec.datatype == "BYTES":
        array = np.empty(shape, dtype=object)
        array.fill(b"")
        return array
    return np.zeros(shape, numpy_type(spec.datatype))


def _is_pickle(path: Path) -> InvalidInput:
    return InvalidInput(
        f"{path.name} is a pickle, and loading one runs whatever program it holds: where you trust it, load it and "
        "save the model with sihe.serving.predictive (save_sklearn, save_torch), or convert it to ONNX"
    )
