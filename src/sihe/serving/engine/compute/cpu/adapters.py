"""Adapters as the operations read them: A [rank, in] and B, scaled, [rank, out], of each product of each layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sihe.models.config import ModelConfig
from sihe.models.lora import Adapter, Lora
from sihe.serving.engine.adapters import ADAPTER
from sihe.serving.engine.compute.cpu.layers import Weights

PRODUCTS = ("q_proj", "o_proj", "gate_proj", "down_proj")
"""The products of a block, by the first of the parts that each stands for."""


class AdapterTables:
    """For each product of each layer a table of addresses by the adapter's number; zeros where there is none."""

    def __init__(self, config: ModelConfig, weights: Weights, places: int) -> None:
        self.places = places
        heads = config.num_heads + 2 * config.num_kv_heads
        self._rows = (heads * config.head_dim, config.hidden_size, 2 * config.intermediate_size, config.hidden_size)
        self._outputs = [weights.outputs(layer) for layer in range(config.num_layers)]
        self._tables: NDArray[np.int64] = np.zeros((config.num_layers, len(PRODUCTS), places + 1, 3), np.int64)
        self._kept: dict[int, list[Tensor]] = {}

    def at(self, layer: int, product: int) -> int:
        """The address of one product's table."""
        return self._tables[layer, product].ctypes.data

    def put(self, number: int, lora: Lora | None) -> None:
        """Fills one number's entries, or clears them."""
        self._tables[:, :, number] = 0
        kept: list[Tensor] = []
        for layer, adapter in () if lora is None else lora.adapters(ADAPTER):
            product = PRODUCTS.index(adapter.layout.parts[0])
            a_RD = adapter.a.detach().float().contiguous()
            b_RO = _b(adapter, self._rows[product], self._outputs[layer][product])
            kept += [a_RD, b_RO]
            self._tables[layer, product, number] = (a_RD.data_ptr(), b_RO.data_ptr(), len(a_RD))
        self._kept[number] = kept


def _b(adapter: Adapter, rows: int, outputs: int) -> Tensor:
    """B [rank, outputs] with its scale, zeros where the packed product is padded: gate and up behind each half."""
    halves = 2 if adapter.layout.parts[0] == "gate_proj" else 1
    b_hOR = (adapter.rows_of_b(rows).detach().float() * adapter.config.scale).view(halves, rows // halves, -1)
    padded_hOR = nn.functional.pad(b_hOR, (0, 0, 0, outputs // halves - b_hOR.shape[1]))
    return padded_hOR.flatten(0, 1).T.contiguous()
