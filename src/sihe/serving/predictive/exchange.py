"""An inference as shadow and log see it (`serving.exchange`): asked of another version, compared, written down."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from typing import Any

import orjson

from sihe.core.errors import InvalidInput
from sihe.serving.errors import StreamClosed
from sihe.serving.exchange import MAX_CHARACTERS, MAX_NUMBERS, Agreement, Answer, Written, apart, fitting, held_bytes
from sihe.serving.predictive.agreement import agreement
from sihe.serving.predictive.datatypes import as_objects, to_binary
from sihe.serving.predictive.predictor import Predictor
from sihe.serving.predictive.types import Array, DataType, InferenceRequest, InferenceResult, ModelDescription

_LEAST_URGENT = 100


@dataclass(frozen=True, slots=True)
class Inference:
    """A request to a predictive model. `description` is that of the version which answered it."""

    request: InferenceRequest
    description: ModelDescription
    tenant: str = ""

    @property
    def kind(self) -> str:
        """`infer`, as the protocol has it."""
        return "infer"

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        return _size(self.request.inputs)

    def begin(self, served: object) -> Inferring:
        """Asks another version. Raises `InvalidInput` where it wants other inputs, or lacks an output."""
        if not isinstance(served, Predictor):
            raise InvalidInput("the shadow is no predictive model: give it a version of the same kind")
        self._check_fits(served.description)
        request = replace(self.request, timeout_s=None, priority=_LEAST_URGENT)
        return Inferring(served.submit(request), served.description)

    def written(self) -> Written:
        """The inputs in the protocol's JSON."""
        return _written("inputs", self.request.inputs, {spec.name: spec.datatype for spec in self.description.inputs})

    def _check_fits(self, there: ModelDescription) -> None:
        given = {spec.name: spec.datatype for spec in self.description.inputs}
        wanted = {spec.name: spec for spec in there.inputs}
        for name in given.keys() ^ wanted.keys():
            raise InvalidInput(f"the shadow has other inputs: {name!r} is only in one of the two models")
        for name, array in self.request.inputs.items():
            spec = wanted[name]
            if spec.datatype != given[name] or not spec.takes(array.shape):
                raise InvalidInput(
                    f"the shadow wants {name!r} as {spec.datatype} of shape {list(spec.shape)} (-1: any size), and "
                    f"requests bring {given[name]} of shape {list(array.shape)}"
                )
        for name in self.request.outputs:
            there.output(name)


@dataclass(frozen=True, slots=True)
class Inferring:
    """An inference that is being computed."""

    future: Future[InferenceResult]
    description: ModelDescription

    def result(self) -> Inferred:
        """Blocks. Raises `StreamClosed` where it was closed before it began, and what the model raises."""
        try:
            return Inferred.of(self.future.result(), self.description)
        except CancelledError:
            raise StreamClosed("the copy was given up") from None

    def close(self) -> None:
        """Takes it out of the queue. A batch that has begun ends by itself."""
        self.future.cancel()


@dataclass(frozen=True, slots=True)
class Inferred:
    """The outputs that were asked for."""

    outputs: Mapping[str, Array]
    datatypes: Mapping[str, DataType]

    @classmethod
    def of(cls, result: InferenceResult, description: ModelDescription) -> Inferred:
        """What a model gave, to be held for a while."""
        datatypes = {spec.name: spec.datatype for spec in description.outputs}
        return cls({name: apart(array) for name, array in result.outputs.items()}, datatypes)

    @property
    def prompt_tokens(self) -> int:
        """None: it knows no tokens."""
        return 0

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        return _size(self.outputs)

    def agreement(self, other: Answer) -> Agreement:
        """The share of equal outputs."""
        share = agreement(self.outputs, other.outputs, self.datatypes) if isinstance(other, Inferred) else 0.0
        return Agreement(share, share == 1.0, "outputs")

    def written(self) -> Written:
        """The outputs in the protocol's JSON."""
        return _written("outputs", self.outputs, self.datatypes)


def _size(arrays: Mapping[str, Array]) -> int:
    return sum(
        sum(len(item) if isinstance(item, bytes | str) else 8 for item in array.flat)
        if array.dtype.kind == "O"
        else held_bytes(array)
        for array in arrays.values()
    )


def _written(what: str, arrays: Mapping[str, Array], datatypes: Mapping[str, DataType]) -> Written:
    """Tensors as name, datatype, shape and data: up to a bound, and then `kept` says how many values there are of it.

    A NaN is null, as JSON has none.
    """
    numbers, characters = MAX_NUMBERS, MAX_CHARACTERS
    listed: list[dict[str, Any]] = []
    whole: list[bytes] = []
    for name, array in arrays.items():
        datatype = datatypes[name]
        data: list[Any]
        if datatype == "BYTES":
            # What is cut is the rest of a value, or of the values: both are seen by the number that is kept.
            texts = [item.decode("utf-8", "replace") for item in as_objects(array.flat[:numbers])]
            data = fitting(texts, characters)
            characters -= sum(len(text) for text in data)
        else:
            data = array.flat[:numbers].tolist()
        numbers -= len(data)
        item: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape), "data": data}
        if len(data) < array.size:
            item["kept"] = len(data)
        listed.append(item)
        whole += (f"{name}/{datatype}/{list(array.shape)}/".encode(), to_binary(array, datatype))
    return Written(orjson.dumps({what: listed}).decode(), sum(len(part) for part in whole[1::2]), whole)
