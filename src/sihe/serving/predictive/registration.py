"""From a trained model to a version in the registry: saved in a form that runs no code, described, tried, registered.

Each `save_…` runs the model on the caller's example, so that a description that does not fit is found here and not when
a deployment loads it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sihe.core.errors import AlreadyExists, InvalidInput
from sihe.core.lazy import require
from sihe.core.tracking import ModelVersion, Tracking
from sihe.serving.predictive.backends.sklearn import EXTRA, METHODS
from sihe.serving.predictive.config import KIND, KIND_TAG, PredictiveConfig
from sihe.serving.predictive.datatypes import as_objects
from sihe.serving.predictive.folder import describe, example_of, tensor_spec, write_description
from sihe.serving.predictive.predictor import Predictor
from sihe.serving.predictive.types import Array, ModelDescription, TensorSpec

if TYPE_CHECKING:
    import torch


def save_sklearn(
    estimator: Any, folder: Path, *, example: Any, outputs: Sequence[str] = (), trusted_types: Sequence[str] = ()
) -> ModelDescription:
    """Writes a fitted scikit-learn estimator or pipeline to a new `folder`; what it takes and gives.

    `example` is some rows of its input: an array of numbers (rows x features), a list of documents, or an array of text
    (rows x columns). `outputs` (of label, prediction, probabilities, scores, features) default to what it can do.
    `trusted_types` are types outside scikit-learn that it holds. Raises `InvalidInput`, `MissingExtra`.
    """
    skops = require("skops.io", extra=EXTRA)
    import sklearn

    rows = _example_array(example)
    given = rows.tolist() if rows.ndim == 1 and rows.dtype == object else np.asarray(example)
    with _new_folder(folder):
        skops.dump(estimator, folder / "model.skops")
        specs = []
        for name in outputs or _usual_outputs(estimator):
            made = _called(estimator, name, given)
            specs.append(tensor_spec(name, made, batched=True, labels=_labels(estimator, name, made)))
        stored = as_objects(rows) if rows.dtype.kind in "USO" else rows
        return _finish(
            folder,
            ModelDescription(
                platform="sklearn_skops",
                file="model.skops",
                inputs=(tensor_spec("input", stored, batched=True),),
                outputs=tuple(specs),
                made_with={"scikit-learn": sklearn.__version__},
            ),
            {"input": stored},
            PredictiveConfig(trusted_types=tuple(trusted_types)),
        )


def save_torch(
    module: torch.nn.Module,
    folder: Path,
    *,
    example: Mapping[str, torch.Tensor],
    outputs: Sequence[str] = ("output",),
    batched: bool = True,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> ModelDescription:
    """Exports a module to a new `folder` with `torch.export`; what it takes and gives.

    `example` has a tensor for each argument of `forward`, by name, of at least two rows where the model is `batched`
    (torch takes a size of one for a constant). `outputs` name what `forward` returns, in order; `labels` name the
    positions of an output's last dimension. Raises `InvalidInput`, and what torch raises for a module that it cannot
    export.
    """
    import torch

    for name, tensor in example.items():
        if batched and (tensor.dim() == 0 or tensor.shape[0] < 2):
            raise InvalidInput(f"example {name!r} needs two rows or more, got {list(tensor.shape)}: repeat a row")
    was_training = module.training
    module.eval()
    try:
        rows = torch.export.Dim("rows")
        dynamic = {name: {0: rows} for name in example} if batched else None
        program = torch.export.export(module, (), dict(example), dynamic_shapes=dynamic)
        with torch.inference_mode():
            made = module(**example)
    finally:
        module.train(was_training)
    tensors = made if isinstance(made, tuple | list) else (made,)
    if len(tensors) != len(outputs):
        raise InvalidInput(f"the module returns {len(tensors)} tensors, and outputs names {len(outputs)}")
    inputs = tuple(_torch_spec(name, tensor, batched) for name, tensor in example.items())
    named = labels or {}
    results = tuple(
        _torch_spec(name, tensor, batched, named.get(name, ())) for name, tensor in zip(outputs, tensors, strict=True)
    )
    with _new_folder(folder):
        torch.export.save(program, folder / "model.pt2")
        return _finish(
            folder,
            ModelDescription(
                platform="pytorch_export",
                file="model.pt2",
                inputs=inputs,
                outputs=results,
                batched=batched,
                made_with={"torch": torch.__version__},
            ),
            {name: _plain(tensor) for name, tensor in example.items()},
            PredictiveConfig(),
        )


def save_onnx(
    file: Path,
    folder: Path,
    *,
    example: Mapping[str, Array] | None = None,
    batched: bool | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> ModelDescription:
    """Copies an ONNX file to a new `folder`; what its graph takes and gives.

    `batched` overrides what the graph's free dimensions suggest. `example` is tried (zeros otherwise). `labels` name
    the positions of an output's last dimension. Raises `CorruptData`, `InvalidInput`, `MissingExtra`.
    """
    with _new_folder(folder):
        shutil.copyfile(file, folder / "model.onnx")
        found = describe(folder)
        named = labels or {}
        description = ModelDescription(
            platform="onnx_onnxv1",
            file="model.onnx",
            inputs=found.inputs,
            outputs=tuple(
                TensorSpec(spec.name, spec.datatype, spec.shape, tuple(named.get(spec.name, ())))
                for spec in found.outputs
            ),
            batched=found.batched if batched is None else batched,
        )
        given = example_of(folder, description) if example is None else dict(example)
        return _finish(folder, description, given, PredictiveConfig())


def register(
    tracking: Tracking,
    name: str,
    folder: Path,
    *,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    config: PredictiveConfig | None = None,
) -> ModelVersion:
    """Records a predictive model's folder as the next version of model `name`, after it has answered its example.

    Raises what is wrong with the folder; nothing is registered then.
    """
    try_out(folder, config)
    return tracking.register_model(name, folder, run_id=run_id, tags={**(tags or {}), KIND_TAG: KIND})


def try_out(folder: Path, config: PredictiveConfig | None = None) -> None:
    """Loads the folder's model and lets it answer its example. Raises what is wrong with either."""
    with Predictor.load(folder, config) as predictor:
        predictor.warm()


def _finish(
    folder: Path, description: ModelDescription, example: Mapping[str, Array], config: PredictiveConfig
) -> ModelDescription:
    write_description(folder, description, example)
    try_out(folder, config)
    return description


class _new_folder:  # noqa: N801 - used as a context
    """A folder that was not there and does not stay when its filling fails."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        if self._folder.exists() and any(self._folder.iterdir()):
            raise AlreadyExists("folder", str(self._folder), hint="name a new one")
        self._folder.mkdir(parents=True, exist_ok=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _example_array(example: Any) -> Array:
    rows: Array = np.asarray(example)
    if rows.ndim == 0 or not rows.size:
        raise InvalidInput("the example needs at least one row")
    if rows.dtype.kind in "US":
        rows = rows.astype(object)
    return rows


def _usual_outputs(estimator: Any) -> list[str]:
    if hasattr(estimator, "predict_proba"):
        return ["label", "probabilities"]
    if getattr(estimator, "_estimator_type", None) == "classifier" or hasattr(estimator, "classes_"):
        return ["label", "scores"] if hasattr(estimator, "decision_function") else ["label"]
    if hasattr(estimator, "predict"):
        return ["prediction"]
    return ["features"]


def _called(estimator: Any, name: str, rows: Any) -> Array:
    method = METHODS.get(name)
    if method is None or not hasattr(estimator, method):
        able = [known for known, method in METHODS.items() if hasattr(estimator, method)]
        raise InvalidInput(f"a {type(estimator).__name__} gives no output {name!r}: it can give {', '.join(able)}")
    made = getattr(estimator, method)(rows)
    array: Array = made.toarray() if hasattr(made, "toarray") else np.asarray(made)
    return as_objects(array) if array.dtype.kind in "USO" else array


def _labels(estimator: Any, name: str, made: Array) -> list[str]:
    classes = getattr(estimator, "classes_", None)
    if name not in ("probabilities", "scores") or classes is None or made.ndim != 2 or len(classes) != made.shape[1]:
        return []
    return [str(label) for label in classes]


def _torch_spec(name: str, tensor: torch.Tensor, batched: bool, labels: Sequence[str] = ()) -> TensorSpec:
    spec = tensor_spec(name, _plain(tensor), batched=batched, labels=labels)
    return TensorSpec(name, "BF16", spec.shape, spec.labels) if str(tensor.dtype) == "torch.bfloat16" else spec


def _plain(tensor: torch.Tensor) -> Array:
    plain = tensor.detach().cpu()
    array: Array = (plain.float() if str(plain.dtype) == "torch.bfloat16" else plain).numpy()
    return array
