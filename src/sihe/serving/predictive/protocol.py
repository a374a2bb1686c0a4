"""Inference requests and answers of the Open Inference Protocol v2, as bytes. Knows no web framework.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md with three of
Triton's extensions: binary tensor data, classification, and the `timeout` and `priority` parameters of its schedule
policy (https://github.com/triton-inference-server/server/tree/main/docs/protocol). Other parameters are ignored, as
the protocol wants; those that would change the answer here and are not supported are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from sihe.core.errors import InvalidInput
from sihe.serving.errors import UnsupportedParameter
from sihe.serving.predictive.datatypes import check_shape, from_binary, from_json, to_binary, to_json
from sihe.serving.predictive.types import Array, InferenceRequest, ModelDescription, TensorSpec

EXTENSIONS = ("binary_tensor_data", "classification", "parameters", "schedule_policy", "model_repository(index)")
HEADER_LENGTH = "Inference-Header-Content-Length"
_DIGITS = re.compile(r"[0-9]{1,18}")  # Python refuses to read numbers of thousands of digits
_UNSUPPORTED = ("sequence_id", "shared_memory_region")


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How one output is sent: as bytes after the JSON, and as the best `classes` of it (0: as it is)."""

    binary: bool = False
    classes: int = 0


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request, and what its answer must look like."""

    request: InferenceRequest
    id: str | None
    forms: Mapping[str, OutputForm]


def parse_request(
    body: bytes, header_length: str | None, description: ModelDescription, *, left_s: float | None = None
) -> ParsedRequest:
    """The request in a body. `header_length` is what its header says of the JSON's size, where bytes follow it, and
    `left_s` what is left of the time that its client gives it beside the body; the shorter time holds.

    Raises `InvalidInput` that names what is wrong.
    """
    text, rest = _split(body, header_length)
    values = _object(text)
    parameters = _parameters(values, "the request")
    inputs = _inputs(values, rest, description)
    forms = _forms(values, parameters, description)
    id = values.get("id")
    if id is not None and not isinstance(id, str):
        raise InvalidInput(f"id must be a string, got {id!r:.100}")
    request = InferenceRequest(
        inputs=inputs,
        outputs=tuple(forms),
        timeout_s=_timeout_s(parameters, left_s),
        priority=parameters.get("priority", 0),
    )
    return ParsedRequest(request, id, forms)


def build_answer(
    parsed: ParsedRequest,
    outputs: Mapping[str, Array],
    description: ModelDescription,
    *,
    model_name: str,
    model_version: str,
) -> tuple[bytes, int | None]:
    """The body of an answer, and the size of its JSON where bytes follow it. Raises what JSON cannot carry."""
    listed: list[dict[str, Any]] = []
    pieces: list[bytes] = []
    for name, form in parsed.forms.items():
        spec, array = description.output(name), outputs[name]
        if form.classes:
            spec, array = _classified(spec, array, form.classes, batched=description.batched)
        item: dict[str, Any] = {"name": name, "datatype": spec.datatype, "shape": list(array.shape)}
        if form.binary:
            data = to_binary(array, spec.datatype)
            item["parameters"] = {"binary_data_size": len(data)}
            pieces.append(data)
        else:
            item["data"] = to_json(array, spec.datatype, name)
        listed.append(item)
    answer: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if parsed.id is not None:
        answer["id"] = parsed.id
    text = orjson.dumps(answer | {"outputs": listed})
    return (b"".join([text, *pieces]), len(text)) if pieces else (text, None)


# ---- the parts of a request ----------------------------------------------------------------------------------------


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    if header_length is None:
        return body, memoryview(b"")
    if not _DIGITS.fullmatch(header_length) or int(header_length) > len(body):
        raise InvalidInput(
            f"{HEADER_LENGTH} must be the size of the JSON, at most the body's {len(body)} bytes, "
            f"got {header_length!r:.100}"
        )
    size = int(header_length)
    return body[:size], memoryview(body)[size:]


def _object(text: bytes) -> dict[str, Any]:
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the body is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidInput(f"the body must be a JSON object, got {type(values).__name__}")
    return values


def _parameters(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = values.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidInput(f"parameters of {where} must be an object, got {parameters!r:.100}")
    for name in _UNSUPPORTED:
        if name in parameters:
            raise UnsupportedParameter(name, parameters[name], hint=f"{where} must stand on its own: leave it out")
    return parameters


def _list(values: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    items = values.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidInput(f"{key} must be a list of objects, got {items!r:.100}")
    return items


def _inputs(values: Mapping[str, Any], rest: memoryview, description: ModelDescription) -> dict[str, Array]:
    specs = {spec.name: spec for spec in description.inputs}
    arrays: dict[str, Array] = {}
    at = 0
    for item in _list(values, "inputs"):
        name = item.get("name")
        spec = specs.get(name) if isinstance(name, str) else None
        if spec is None or name in arrays:
            known = ", ".join(specs)
            raise InvalidInput(f"inputs of this model are {known}, each once; got {name!r:.100}")
        shape = _fitting_shape(item, spec)
        size = _parameters(item, f"input {spec.name!r}").get("binary_data_size")
        if (size is None) == ("data" not in item):
            raise InvalidInput(f"input {spec.name!r} needs either data or binary_data_size")
        if size is None:
            arrays[spec.name] = from_json(item["data"], spec.datatype, shape, spec.name)
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest) - at:
            raise InvalidInput(
                f"input {spec.name!r}: binary_data_size is {size!r:.100}, and {len(rest) - at} bytes are left "
                f"after the JSON (is {HEADER_LENGTH} set?)"
            )
        arrays[spec.name] = from_binary(rest[at : at + size], spec.datatype, shape, spec.name)
        at += size
    if at != len(rest):
        raise InvalidInput(f"{len(rest) - at} bytes follow the last tensor: binary_data_size must cover them all")
    missing = [name for name in specs if name not in arrays]
    if missing:
        raise InvalidInput(f"the model also needs input {', '.join(missing)}")
    _check_rows(arrays, description)
    return arrays


def _fitting_shape(item: Mapping[str, Any], spec: TensorSpec) -> tuple[int, ...]:
    if item.get("datatype") != spec.datatype:
        raise InvalidInput(f"input {spec.name!r} is {spec.datatype}, got {item.get('datatype')!r:.100}")
    shape = check_shape(item.get("shape"), spec.name)
    if not spec.takes(shape):
        raise InvalidInput(f"input {spec.name!r} has shape {list(spec.shape)} (-1: any size), got {list(shape)}")
    return shape


def _check_rows(arrays: Mapping[str, Array], description: ModelDescription) -> None:
    if not description.batched:
        return
    rows = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(rows.values())) != 1 or 0 in rows.values():
        counts = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise InvalidInput(f"every input has the same number of rows, at least one; got {counts}")


def _forms(
    values: Mapping[str, Any], parameters: Mapping[str, Any], description: ModelDescription
) -> dict[str, OutputForm]:
    binary = _flag(parameters, "binary_data_output")
    if not values.get("outputs"):
        return {spec.name: OutputForm(binary=binary) for spec in description.outputs}
    forms: dict[str, OutputForm] = {}
    for item in _list(values, "outputs"):
        name = item.get("name")
        if not isinstance(name, str) or name in forms:
            raise InvalidInput(f"outputs are asked for by name, each once; got {name!r:.100}")
        spec = description.output(name)
        own = _parameters(item, f"output {name!r}")
        classes = own.get("classification", 0)
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
            raise InvalidInput(f"output {name!r}: classification is a number of classes, got {classes!r:.100}")
        if classes and spec.datatype in ("BYTES", "BOOL"):
            raise InvalidInput(f"output {name!r} is {spec.datatype}: only numbers can be ranked as classes")
        forms[name] = OutputForm(binary=_flag(own, "binary_data", binary), classes=classes)
    return forms


def _flag(parameters: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"{name} must be true or false, got {value!r:.100}")
    return value


def _timeout_s(parameters: Mapping[str, Any], left_s: float | None) -> float | None:
    """Triton's parameter is in microseconds, counts from here on, and is none where it is 0."""
    timeout_us = parameters.get("timeout")
    timeout_us = 0 if timeout_us is None else timeout_us
    if isinstance(timeout_us, bool) or not isinstance(timeout_us, int | float) or timeout_us < 0:
        raise InvalidInput(f"timeout is a number of microseconds, got {timeout_us!r:.100}")
    limits_s = [timeout_us / 1e6] if timeout_us else []
    return min([*limits_s, *([] if left_s is None else [left_s])], default=None)


# ---- classification ------------------------------------------------------------------------------------------------


def _classified(spec: TensorSpec, array: Array, classes: int, *, batched: bool) -> tuple[TensorSpec, Array]:
    """The highest values of each row as text: `value:index`, or `value:index:label` where the model names them."""
    rows: Any = array.reshape(array.shape[0], -1) if batched else array.reshape(1, -1)
    count = min(classes, rows.shape[1])
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    named = np.empty(best.shape, dtype=object)
    for row, indices in enumerate(best):
        for rank, index in enumerate(indices):
            label = f":{spec.labels[index]}" if index < len(spec.labels) else ""
            named[row, rank] = f"{rows[row, index]}:{index}{label}".encode()
    return TensorSpec(spec.name, "BYTES", (-1, -1)), named if batched else named[0]
