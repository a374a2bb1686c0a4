"""What comes behind the hidden states: a vector of each document, or its score. Always in float32.

Shapes: T tokens of all documents side by side, D hidden, N documents, W width of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sihe.core.errors import CorruptData
from sihe.models.encoder import Encoder
from sihe.models.errors import CheckpointMismatch
from sihe.serving.engine.encoder.recipe import DenseLayer, Recipe
from sihe.serving.engine.encoder.types import Capability


@dataclass(frozen=True, slots=True)
class Layout:
    """How documents lie in the row, [N]: the first token of each, how many it has, how many of those are its prompt."""

    starts: Tensor
    lengths: Tensor
    skipped: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], skipped: Sequence[int]) -> Layout:
        """Documents of these lengths, in this order."""
        lengths_N = torch.tensor(lengths)
        return cls(lengths_N.cumsum(0) - lengths_N, lengths_N, torch.tensor(skipped))


class Tail(Protocol):
    """From hidden states to answers."""

    capability: Capability
    width: int

    def __call__(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """[N, W] float32."""
        ...


class EmbeddingTail:
    """Pools, maps and normalises as the recipe says."""

    capability: Capability = "embeddings"

    def __init__(self, recipe: Recipe, hidden_size: int) -> None:
        self._recipe = recipe
        width = hidden_size
        layers: list[nn.Module] = []
        for layer in recipe.layers:
            if layer.in_features != width:
                reason = f"takes {layer.in_features} numbers, and what comes before gives {width}"
                raise CheckpointMismatch(layer.folder, "linear.weight", reason)
            layers += [_linear(layer), getattr(nn, layer.activation)()]
            width = layer.out_features
        self._layers = nn.Sequential(*layers)
        self.width = width

    def __call__(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """The vector of each document."""
        x_NW: Tensor = self._layers(self._pooled(x_TD, layout))
        return nn.functional.normalize(x_NW, dim=-1) if self._recipe.normalise else x_NW

    def _pooled(self, x_TD: Tensor, layout: Layout) -> Tensor:
        mode, ends_N = self._recipe.pooling, layout.starts + layout.lengths
        if mode in ("cls", "last"):
            return x_TD[layout.starts if mode == "cls" else ends_N - 1].float()
        document_T = torch.repeat_interleave(layout.lengths)
        place_T = torch.arange(len(x_TD)) - layout.starts[document_T]
        is_pooled_T = place_T >= layout.skipped[document_T]
        x_TD, document_T, place_T = x_TD[is_pooled_T].float(), document_T[is_pooled_T], place_T[is_pooled_T]
        count_N1 = (layout.lengths - layout.skipped)[:, None].float()
        into_ND = x_TD.new_zeros(len(layout.lengths), x_TD.shape[1])
        match mode:
            case "max":
                index_TD = document_T[:, None].expand_as(x_TD)
                return into_ND.scatter_reduce_(0, index_TD, x_TD, "amax", include_self=False)
            case "weighted":
                weight_T1 = (place_T + 1)[:, None].float()
                total_N1 = count_N1.new_zeros(count_N1.shape).index_add_(0, document_T, weight_T1)
                return into_ND.index_add_(0, document_T, x_TD * weight_T1) / total_N1
            case _:
                sum_ND = into_ND.index_add_(0, document_T, x_TD)
                return sum_ND / (count_N1.sqrt() if mode == "mean_sqrt" else count_N1)


class FirstTail:
    """The hidden state of a document's first token, from which a reranker's score is made: what bytes change of it."""

    capability: Capability = "embeddings"

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """The vector of each document."""
        return x_TD[layout.starts].float()


class ScoreTail:
    """The score of a reranker: the logistic function of its one logit, so that it lies in 0..1."""

    capability: Capability = "rerank"
    width = 1

    def __init__(self, model: Encoder) -> None:
        self._model = model

    def __call__(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """The score of each document."""
        return torch.sigmoid(self._model.pooled(x_TD[layout.starts]).float())


def _linear(layer: DenseLayer) -> nn.Linear:
    path = layer.folder / "model.safetensors"
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptData(path, str(error), hint="a Dense module has its weights as safetensors") from error
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias)
    own = {name: tuple(tensor.shape) for name, tensor in linear.state_dict().items()}
    found = {name.removeprefix("linear."): tensor.float() for name, tensor in weights.items()}
    for name in own.keys() | found.keys():
        if name not in found or name not in own:
            raise CheckpointMismatch(layer.folder, name, "is missing" if name in own else "is not used")
        if tuple(found[name].shape) != own[name]:
            raise CheckpointMismatch(layer.folder, name, f"has shape {list(found[name].shape)}, not {list(own[name])}")
    linear.load_state_dict(found)
    return linear.requires_grad_(False).eval()
