"""The planner's activation model beside what autograd keeps of the real decoder, byte by byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sihe.cluster.planner.activations import layer_bytes
from sihe.cluster.planner.types import Layout, TransformerShape
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder

BATCH, LENGTH = 2, 64


def kept_bytes(layers: int, kv_heads: int) -> int:
    """Of the memory behind all tensors that the forward pass over blocks saves, the bytes that no weight owns."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(96, 64, layers, 4, kv_heads, 16, 160, LENGTH))
    tokens = torch.randint(96, (BATCH, LENGTH))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    memory: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            memory[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(tokens)
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in memory.values())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_layer_keeps_exactly_the_bytes_of_the_formula(kv_heads: int) -> None:
    shape = TransformerShape("tiny", 1, 64, 4, kv_heads, 16, 160, vocab=96, sequence=LENGTH)
    layout = Layout(micro_batch=BATCH, precision="fp32")
    # One layer more, so that what stands below and above the layers drops out.
    measured = kept_bytes(3, kv_heads) - kept_bytes(2, kv_heads)
    assert measured == layer_bytes(shape, layout)
