"""PyTorch models from `torch.export` (`.pt2`): a graph of operators with its weights, no Python of its author.

A `.pt2` may hold pickles beside plain tensors, and `torch.export.load` would run them, so an archive with one is
refused before it is loaded. What remains is not a sandbox: deploy archives of people whom you trust.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import torch

from sihe.core.errors import CorruptData, InvalidInput
from sihe.serving.predictive.datatypes import numpy_type
from sihe.serving.predictive.types import Array, DataType, ModelDescription

_TORCH: dict[DataType, torch.dtype] = {
    "BOOL": torch.bool, "UINT8": torch.uint8, "UINT16": torch.uint16, "UINT32": torch.uint32, "UINT64": torch.uint64,
    "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32, "INT64": torch.int64,
    "FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32, "FP64": torch.float64,
}  # fmt: skip
_MAX_CONFIG_BYTES = 64 * 2**20


class TorchBackend:
    """An exported program. Its outputs are described in the order in which it returns them."""

    def __init__(self, module: torch.nn.Module, description: ModelDescription) -> None:
        for spec in (*description.inputs, *description.outputs):
            if spec.datatype not in _TORCH:
                raise InvalidInput(f"tensor {spec.name!r}: PyTorch has no {spec.datatype}")
        self._device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
        self._module: torch.nn.Module | None = module
        self._description = description

    @classmethod
    def load(cls, path: Path, description: ModelDescription) -> TorchBackend:
        """The program of a file. Raises `CorruptData`, or `InvalidInput` for one with pickles."""
        for reason in pickles_in(path):
            raise InvalidInput(
                f"{path.name} holds a pickle ({reason}), and loading one runs whatever program it holds: export the "
                "model anew with weights that are plain tensors"
            )
        try:
            program = torch.export.load(path)
        except Exception as error:
            raise CorruptData(path, f"torch.export cannot load it: {error}") from error
        expected = tuple(spec.name for spec in description.inputs)
        if program.graph_signature.user_inputs != expected:
            raise CorruptData(path, f"it takes {program.graph_signature.user_inputs}, and {expected} are described")
        if len(program.graph_signature.user_outputs) != len(description.outputs):
            raise CorruptData(
                path,
                f"it gives {len(program.graph_signature.user_outputs)} outputs, and {len(description.outputs)} "
                "are described",
            )
        return cls(program.module(), description)

    def run(self, inputs: Mapping[str, Array], outputs: frozenset[str]) -> Mapping[str, Array]:
        """Runs the whole graph."""
        module = self._module
        assert module is not None, "closed only after the last batch"
        feed = {spec.name: self._fed(inputs[spec.name], spec.datatype) for spec in self._description.inputs}
        with torch.inference_mode():
            made = module(**feed)
        tensors = made if isinstance(made, tuple | list) else (made,)
        return {
            spec.name: _as_array(tensor, spec.datatype)
            for spec, tensor in zip(self._description.outputs, tensors, strict=True)
            if spec.name in outputs
        }

    def close(self) -> None:
        """Lets the program go."""
        self._module = None

    def _fed(self, array: Array, datatype: DataType) -> torch.Tensor:
        if not array.flags.writeable or not array.flags.c_contiguous:
            array = array.copy()  # torch has no tensors that must not be written
        return torch.from_numpy(array).to(device=self._device, dtype=_TORCH[datatype])


def pickles_in(path: Path) -> Iterator[str]:
    """What in a `.pt2` archive would be unpickled. Raises `CorruptData` when it is no such archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith("/archive_format") for name in names):
                raise CorruptData(path, "it is no archive of torch.export", hint="save it with save_torch")
            for name in names:
                yield from _pickles_in_part(archive, name)
    except zipfile.BadZipFile as error:
        raise CorruptData(path, f"it is no archive: {error}") from error


def _pickles_in_part(archive: zipfile.ZipFile, name: str) -> Iterator[str]:
    folder, file = name.split("/")[-2:] if "/" in name else ("", name)
    if folder == "constants" and (file.endswith(".pt") or "obj" in file):
        yield name  # objects, or a former release's constants
    if folder in ("constants", "weights") and file.endswith("_config.json"):
        if archive.getinfo(name).file_size > _MAX_CONFIG_BYTES:
            raise CorruptData(str(archive.filename), f"{name} has more than {_MAX_CONFIG_BYTES} bytes")
        config: Any = orjson.loads(archive.read(name))
        for key, payload in config.get("config", {}).items():
            path_name = str(payload.get("path_name", ""))
            if payload.get("use_pickle") or not path_name.startswith(("weight_", "tensor_")):
                yield f"{name}: {key}"
    if folder == "sample_inputs":
        # torch falls back to a full unpickling where its safe one refuses.
        try:
            torch.load(io.BytesIO(archive.read(name)), weights_only=True)
        except Exception:  # noqa: BLE001 - whatever it refuses is what must not be loaded
            yield name


def _as_array(tensor: torch.Tensor, datatype: DataType) -> Array:
    plain = tensor.detach().cpu()
    if plain.dtype == torch.bfloat16:
        plain = plain.float()
    array: Array = plain.numpy()
    return array.astype(numpy_type(datatype), copy=False)
