"""scikit-learn models from `.skops` files, which hold no code: only types that are trusted are built.

skops trusts most of scikit-learn's and numpy's own types; trees are trusted here after a look at them (`trees.py`).
Others must be named by whoever deploys (`trusted_types`), never by the file itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sihe.core.errors import CorruptData, InvalidInput
from sihe.core.lazy import require
from sihe.core.telemetry import logger
from sihe.serving.predictive.backends.trees import PLAIN, TREES, check_trees
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.datatypes import as_objects, as_texts, numpy_type
from sihe.serving.predictive.types import Array, ModelDescription, TensorSpec

EXTRA = "predictive"
# Which method of an estimator makes an output of that name.
METHODS = {
    "label": "predict",
    "prediction": "predict",
    "probabilities": "predict_proba",
    "scores": "decision_function",
    "features": "transform",
}


class SklearnBackend:
    """An estimator with its methods as outputs."""

    def __init__(self, estimator: Any, description: ModelDescription) -> None:
        self._methods: dict[str, tuple[Callable[[Any], Any], TensorSpec]] = {}
        if len(description.inputs) != 1:
            raise InvalidInput(f"a scikit-learn model has one input, and {len(description.inputs)} are described")
        self._input = description.inputs[0]
        for spec in description.outputs:
            method = METHODS.get(spec.name)
            if method is None or not hasattr(estimator, method):
                able = [name for name, method in METHODS.items() if hasattr(estimator, method)]
                raise InvalidInput(
                    f"a {type(estimator).__name__} gives no output {spec.name!r}: it can give {', '.join(able)}"
                )
            self._methods[spec.name] = (getattr(estimator, method), spec)

    @classmethod
    def load(cls, path: Path, description: ModelDescription, config: PredictiveConfig) -> SklearnBackend:
        """The estimator in the file. Raises `CorruptData`, `InvalidInput` (types nobody trusts), `MissingExtra`."""
        require("sklearn", extra=EXTRA)
        skops = require("skops.io", extra=EXTRA)
        _warn_of_another_release(description)
        trusted = (*TREES, *PLAIN, *config.trusted_types)
        try:
            strange = [name for name in skops.get_untrusted_types(file=path) if name not in trusted]
        except Exception as error:
            raise CorruptData(path, f"skops cannot read it: {error}") from error
        if strange:
            raise InvalidInput(
                f"{path.name} builds types that are not trusted: {', '.join(strange)}. If you know them, deploy with "
                f"trusted_types={','.join(strange)}"
            )
        try:
            estimator = skops.load(path, trusted=list(trusted))
        except Exception as error:
            raise CorruptData(path, f"skops cannot load it: {error}") from error
        check_trees(estimator)
        return cls(estimator, description)

    def run(self, inputs: Mapping[str, Array], outputs: frozenset[str]) -> Mapping[str, Array]:
        """Calls the method of each wanted output."""
        rows: Any = inputs[self._input.name]
        if self._input.datatype == "BYTES":
            texts = as_texts(rows, self._input.name)
            rows = texts.tolist() if texts.ndim == 1 else texts  # a list of documents, or columns
        made = {}
        for name in sorted(outputs):
            method, spec = self._methods[name]
            made[name] = _as_array(method(rows), spec)
        return made

    def close(self) -> None:
        """Lets the estimator go."""
        self._methods = {}


def _as_array(made: Any, spec: TensorSpec) -> Array:
    array = made.toarray() if hasattr(made, "toarray") else np.asarray(made)  # what is sparse becomes dense
    return as_objects(array) if spec.datatype == "BYTES" else array.astype(numpy_type(spec.datatype), copy=False)


def _warn_of_another_release(description: ModelDescription) -> None:
    import sklearn

    made_with = (description.made_with or {}).get("scikit-learn")
    if made_with and made_with.split(".")[:2] != sklearn.__version__.split(".")[:2]:
        logger("serving").warning("model_of_another_release", made_with=made_with, running=sklearn.__version__)
