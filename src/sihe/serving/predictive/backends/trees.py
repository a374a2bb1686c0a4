"""Decision trees from a file, checked before they are used.

skops does not trust the compiled trees of scikit-learn, because they follow the indices that they were given without
looking: a file could send them into foreign memory or into a circle. Their types build nothing else. So they are
trusted here, and every index is looked at once, when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sihe.core.errors import InvalidInput

TREES = ("sklearn.tree._tree.Tree", "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor")
# Written in Python, and filled with data only: their state can make them answer wrongly, and do nothing else.
PLAIN = (
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn.utils._bunch.Bunch",
)
_LEAF = -1


def check_trees(estimator: Any) -> None:
    """Raises `InvalidInput` when a tree inside the estimator leads outside of itself or of its features."""
    for tree, features in _trees(estimator, None, set()):
        for name, holds in _rules(tree, features):
            if not holds:
                raise InvalidInput(f"a tree of the model is not sound ({name}): save the model again")


def _rules(tree: Any, features: int | None) -> Iterator[tuple[str, bool]]:
    if type(tree).__name__ == "Tree":
        left, right, feature = tree.children_left, tree.children_right, tree.feature
        inner, count = left != _LEAF, tree.node_count
        yield "as many values as nodes", len(tree.value) == count > 0
    else:
        nodes = tree.nodes
        left, right, feature = nodes["left"], nodes["right"], nodes["feature_idx"]
        inner, count = nodes["is_leaf"] == 0, len(nodes)
        categories = nodes["bitset_idx"][inner & (nodes["is_categorical"] != 0)]
        for sets in (tree.raw_left_cat_bitsets, tree.binned_left_cat_bitsets):
            shape = np.shape(sets)
            yield "sets of categories", not categories.size or (len(shape) == 2 and shape[1] == 8)
            yield "indices of categories", not categories.size or int(categories.max()) < shape[0]
        yield "nodes", count > 0
    index = np.arange(count)
    for child in (left, right):
        # A child comes after its parent however scikit-learn grows a tree, so there is no way back.
        at = child.astype(np.int64)
        yield "children", bool(((at[inner] > index[inner]) & (at[inner] < count)).all())
    known = features if features is not None else 0
    yield "features", bool(((feature[inner] >= 0) & (feature[inner] < known)).all())


def _trees(part: Any, features: int | None, seen: set[int]) -> Iterator[tuple[Any, int | None]]:
    """Every tree, with the number of features of what feeds it."""
    if id(part) in seen or isinstance(part, str | bytes | int | float | bool | None):
        return
    seen.add(id(part))
    if f"{type(part).__module__}.{type(part).__qualname__}" in TREES:
        yield part, features
        return
    for child in _children(part):
        yield from _trees(child, _features_of(part, features), seen)


def _features_of(part: Any, outer: int | None) -> int | None:
    """What a part of the model lets through to its trees: a forest checks rows for its trees, which then do not."""
    own = getattr(part, "__dict__", {}).get("n_features_in_")
    if own is None:
        # Lists and the like belong to whoever holds them; an estimator of its own begins anew.
        return outer if isinstance(part, list | tuple | dict | np.ndarray) else None
    names = {kind.__name__ for kind in type(part).__mro__}
    return int(own) if outer is None or "BaseDecisionTree" not in names else min(int(own), outer)


def _children(part: Any) -> Iterable[Any]:
    if isinstance(part, dict):
        return part.values()
    if isinstance(part, list | tuple | set | frozenset):
        return part
    if isinstance(part, np.ndarray):
        return part.ravel() if part.dtype == object else ()
    return getattr(part, "__dict__", {}).values()
