"""What a predictive model takes and gives, and what one request asks of it. Values only.

Names and datatypes are those of the Open Inference Protocol v2
(https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md), with BF16 as
Triton has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from sihe.core.errors import InvalidInput

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
Platform = Literal["sklearn_skops", "pytorch_export", "onnx_onnxv1"]
DataType = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "BF16", "FP32", "FP64", "BYTES",
]  # fmt: skip
DATATYPES: tuple[str, ...] = get_args(DataType)
PLATFORMS: tuple[str, ...] = get_args(Platform)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: its name, datatype, and shape with -1 where any size may stand.

    `labels` name the positions of an output's last dimension, such as the classes of a classifier.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise InvalidInput(f"a tensor needs a name, got {self.name!r}")
        if self.datatype not in DATATYPES:
            raise InvalidInput(
                f"tensor {self.name!r}: the datatype must be one of {', '.join(DATATYPES)}, got {self.datatype!r}"
            )
        for size in self.shape:
            if isinstance(size, bool) or not isinstance(size, int) or size < -1:
                raise InvalidInput(
                    f"tensor {self.name!r}: a dimension is a whole number, or -1 for any size, got {size!r}"
                )

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of `shape` fits."""
        return len(shape) == len(self.shape) and all(
            want in (-1, size) for want, size in zip(self.shape, shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What `model.json` says: which library runs `file`, and what the model takes and gives.

    `batched`: the first dimension of every input and output counts rows that do not influence each other, so that rows
    of several requests may be computed together.
    """

    platform: Platform
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool = True
    made_with: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise InvalidInput(f"platform must be one of {', '.join(PLATFORMS)}, got {self.platform!r}")
        if not self.file or "/" in self.file or "\\" in self.file or self.file.startswith("."):
            raise InvalidInput(f"file must name a file of the model's own folder, got {self.file!r}")
        for what, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [spec.name for spec in specs]
            if not names or len(set(names)) != len(names):
                raise InvalidInput(f"{what} must be at least one tensor, each name once, got {names!r}")
        if self.batched:
            for spec in (*self.inputs, *self.outputs):
                if not spec.shape or spec.shape[0] != -1:
                    raise InvalidInput(
                        f"a batched model has -1 as the first dimension of each tensor, and {spec.name!r} has "
                        f'{list(spec.shape)}: correct it, or say  "batched": false'
                    )

    def output(self, name: str) -> TensorSpec:
        """The output of that name. Raises `InvalidInput`."""
        for spec in self.outputs:
            if spec.name == name:
                return spec
        known = ", ".join(spec.name for spec in self.outputs)
        raise InvalidInput(f"the model has no output {name!r}: it has {known}")


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """One request, checked against the model: arrays by input name, and the outputs that are wanted.

    `timeout_s` counts from submission. A lower `priority` is more urgent; 0 is the default, as in Triton, and counts as
    level 1.
    """

    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    timeout_s: float | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise InvalidInput(f"timeout must be positive, got {self.timeout_s!r} s")
        if isinstance(self.priority, bool) or not isinstance(self.priority, int) or not 0 <= self.priority <= 100:
            raise InvalidInput(f"priority is a whole number from 0 (default) to 100 (least urgent): {self.priority!r}")


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """The wanted outputs, and how the request fared."""

    outputs: Mapping[str, Array]
    queue_s: float  # from submission to the start of its batch
    compute_s: float  # of the batch
    batch_rows: int  # rows that were computed together
