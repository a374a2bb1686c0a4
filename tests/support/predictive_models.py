"""Small predictive models of each library, made when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper


class Scale(torch.nn.Module):
    """Two inputs, two outputs: `factor` x + y, and the sum of x over its last dimension."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.factor * x + y, x.sum(-1)


def features(rows: int, *, seed: int = 0) -> Any:
    """Rows of four numbers."""
    return np.random.default_rng(seed).normal(size=(rows, 4))


def classifier(*, seed: int = 0) -> Any:
    """A fitted classifier of three classes over four features."""
    from sklearn.linear_model import LogisticRegression

    rows = features(90, seed=seed)
    return LogisticRegression().fit(rows, (rows[:, 0] > 0).astype(int) + (rows[:, 1] > 0.5))


def sentiment() -> Any:
    """A fitted pipeline from text to text."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = ["a good day", "a bad day", "nice and good", "awful and bad"]
    return make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, ["pos", "neg", "pos", "neg"])


def matmul_onnx(path: Path, *, factor: float = 1.0, rows: str | int = "rows", length: str | int = 4) -> Path:
    """`z = factor * x` over rows of any length, as an ONNX file."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["z"])],
        "scaling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, length])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [rows, length])],
        [helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def text_onnx(path: Path) -> Path:
    """Text in, the same text out."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["text"], ["same"])],
        "identity",
        [helper.make_tensor_value_info("text", TensorProto.STRING, ["rows", 1])],
        [helper.make_tensor_value_info("same", TensorProto.STRING, ["rows", 1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path
