"""A decoder as a program: the operations of one step in order, with the addresses of weights and buffers in them.

Every architecture is another list of the same few operations (`kernels.Code`), so that one compiled function computes
them all and nothing is compiled for a new model.

T tokens of the step, O tokens whose logits are wanted, D hidden, K KV heads, G query heads of one, H head dim, F
intermediate, E experts, R choices of experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sihe.models.config import ModelConfig
from sihe.models.rope import RotaryTable
from sihe.serving.engine.compute.cpu.kernels import WIDTH, Code, Kind, NormKind
from sihe.serving.engine.compute.cpu.layers import Feedforward, Layer, Mixture, Norm, Weights
from sihe.serving.engine.compute.cpu.tiles import GROUP, PANEL
from sihe.serving.engine.compute.cpu.weights import Packed
from sihe.serving.engine.kv.storage import KvPages
from sihe.serving.engine.large_pages import zeros

Longs = NDArray[np.int64]
PAGE_KINDS = {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16, torch.int8: Kind.INT8}
TOKENS, WANTED, CHOICES = 0, 1, 2
"""Which rows an operation has; `CHOICES` is added where each row is there once for each of its experts."""
_NOT_QUANTISED = (0,) * 7
_NEXT = 18  # where a product names the next one


class AdapterSource(Protocol):
    """Where the operations find adapters."""

    @property
    def places(self) -> int:
        """How many there can be."""
        ...

    def at(self, layer: int, product: int) -> int:
        """The address of one product's table, by number: A, B, rank."""
        ...


class Program:
    """The operations for steps of up to `rows` tokens and `wanted` logits, and the buffers that they use."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        pages: KvPages,
        adapters: AdapterSource,
        *,
        rows: int,
        wanted: int,
    ) -> None:
        self.rows, self.wanted = rows, wanted
        self._config = config
        self._weights = weights
        self._pages = pages
        self._adapters = adapters
        self._kept: list[Any] = []  # what the operations point at
        self._shared: dict[tuple[str, int, int], _Buffer] = {}
        self._shared_inputs: dict[tuple[str, int, int], _Input] = {}
        self._ops: list[list[int]] = []
        self._rotary = _rotary(config)
        self._query_scale = torch.tensor([config.head_dim**-0.5 * math.log2(math.e)])  # powers of 2 are cheaper
        # Numbers of the step, at an address that does not change.
        self._wanted_rows = np.zeros((2, wanted), np.int32)
        self.choices = config.experts_per_token if config.num_experts else 1
        self._build()
        self.ops: Longs = np.array([op + [0] * (WIDTH - len(op)) for op in self._ops], np.int64)
        products = np.flatnonzero(self.ops[:, 0] == Code.MULTIPLY)
        self.ops[products[:-1], _NEXT] = self.ops.ctypes.data + 8 * WIDTH * products[1:]

    @property
    def wanted_rows(self) -> NDArray[np.int32]:
        """[2, O]: the tokens whose logits are wanted and the feed of each, to be filled in for each step."""
        return self._wanted_rows

    def _build(self) -> None:
        config, weights, rows = self._config, self._weights, self.rows
        table = weights.embedding
        stream = self._buffer(rows, _up(config.hidden_size))
        kind = Kind.FLOAT32 if table.dtype == torch.float32 else Kind.BFLOAT16
        places = 0 if weights.places is None else self._at(weights.places)
        self._add(Code.EMBED, TOKENS, kind, self._at(table), config.hidden_size, *stream.ends, places)
        first = weights.layers[0] if weights.layers else None
        width = max((m.inputs for layer in weights.layers for m in (layer.qkv, layer.out)), default=GROUP)
        normed = self._input(rows, _up(config.hidden_size))
        mixed = self._input(rows, max(width, _up(config.num_heads * config.head_dim)))
        projected = self._buffer(rows, first.qkv.outputs if first else PANEL)
        queries = self._buffer(rows * config.num_heads, config.head_dim, apart=False)
        which = TOKENS
        for index, layer in enumerate(weights.layers):
            self._normalise(TOKENS, layer.attention_norm, stream, normed, layer.qkv)
            is_last = index == len(weights.layers) - 1
            self._multiply(TOKENS, layer.qkv, normed, projected, spared=self._query_panels if is_last else (0, 0))
            self._adapt(TOKENS, index, 0, normed, config.hidden_size, projected)
            self._place(index, layer, projected, queries)
            if is_last:  # nobody reads what the other tokens would become from here on
                which, stream = WANTED, self._gathered(stream)
            self._attend(which, index, queries, mixed)
            if layer.out.is_quantised:
                self._normalise(which, None, mixed.exact, mixed, layer.out)
            self._multiply(which, layer.out, mixed, stream, add=True)
            self._adapt(which, index, 1, mixed, config.num_heads * config.head_dim, stream)
            if isinstance(layer.mlp, Mixture):
                self._mixture(which, layer.mlp, layer.mlp_norm, stream, normed)
            else:
                self._normalise(which, layer.mlp_norm, stream, normed, layer.mlp.up)
                self._feedforward(which, layer.mlp, normed, stream, rows, layer=index)
        if which == TOKENS:
            stream = self._gathered(stream)
        self.logits = self._buffer(self.wanted, weights.head.outputs, apart=False)
        self._normalise(WANTED, weights.norm, stream, normed, weights.head)
        self._multiply(WANTED, weights.head, normed, self.logits)

    def _gathered(self, stream: _Buffer) -> _Buffer:
        """The rows of the tokens whose logits are wanted."""
        rows, where = self._buffer(self.wanted, stream.width), self._at(self._wanted_rows)
        nothing = (0, 0, self._at(self._query_scale))  # to multiply by or to add, and a number that is not used
        self._add(
            Code.NORM, WANTED, NormKind.NONE, *stream.ends, where, stream.width, *nothing, *rows.ends, *_NOT_QUANTISED
        )  # fmt: skip
        return rows

    # ---- operations ------------------------------------------------------------------------------------------------

    def _normalise(
        self, which: int, norm: Norm | None, x: _Buffer, target: _Input, reader: Packed, *, gather: int = 0
    ) -> None:
        """`x` normalised (None: as it is) into `target`, as `reader` wants it."""
        kind, weight, bias, eps = NormKind.NONE, 0, 0, 0
        if norm is not None:
            kind, weight, bias, eps = norm.kind, self._at(norm.weight), self._at(norm.bias), self._at(norm.eps)
        else:
            eps = self._query_scale.data_ptr()  # read and not used
        size = self._config.hidden_size if norm is not None else x.width
        self._add(
            Code.NORM, which, kind, *x.ends, gather, size, weight, bias, eps, *target.exact.ends,
            *target.quantised(reader),
        )  # fmt: skip

    def _multiply(
        self,
        which: int,
        matrix: Packed,
        x: _Input,
        y: _Buffer,
        *,
        add: bool = False,
        offsets: int = 0,
        gated: bool = False,
        spared: tuple[int, int] = (0, 0),
    ) -> None:
        source = x.codes if matrix.is_quantised else x.exact
        stack = len(matrix.panels)
        panels = matrix.outputs // PANEL
        self._add(
            Code.MULTIPLY, which, matrix.kind, *source.ends, self._at(matrix.panels), matrix.panels[0, 0].nbytes,
            matrix.steps, panels, self._at(matrix.bias), *y.ends, int(add),
            self._at(matrix.scales), matrix.scales[0, 0].nbytes if matrix.is_quantised else 0,
            self._at(x.scales), self._at(x.sums), 4 * matrix.groups, 0,
            stack if offsets else 0, offsets, matrix.panels[0].nbytes, matrix.scales[0].nbytes, int(gated),
            *spared,
        )  # fmt: skip

    def _adapt(self, which: int, layer: int, product: int, x: _Input, inputs: int, y: _Buffer) -> None:
        if self._adapters.places:
            table = self._adapters.at(layer, product)
            self._add(Code.ADAPT, which, *x.exact.ends, *y.ends, inputs, y.width, table)

    def _place(self, index: int, layer: Layer, projected: _Buffer, queries: _Buffer) -> None:
        cos, sin, half = (0, 0, 0)
        if self._rotary is not None:
            cos, sin, half = self._at(self._rotary[0]), self._at(self._rotary[1]), self._rotary[0].shape[1]
        norms = [0 if norm is None else self._at(norm.weight) for norm in (layer.query_norm, layer.key_norm)]
        eps = self._query_scale if layer.query_norm is None else layer.query_norm.eps
        kind, *where = self._pages_of(index)
        self._add(
            Code.PLACE, TOKENS, *projected.ends, cos, sin, half, *self._heads, *norms, self._at(eps),
            queries.address, kind, *where, self._at(self._query_scale),
        )  # fmt: skip

    def _attend(self, which: int, index: int, queries: _Buffer, mixed: _Input) -> None:
        window = self._config.attention.window or 0
        ends, width = mixed.exact.ends, self._pages.width
        self._add(
            Code.ATTEND, which, queries.address, *self._heads, *self._pages_of(index), window, *ends, width
        )  # fmt: skip

    @property
    def _heads(self) -> tuple[int, int, int]:
        """K, G, H."""
        config = self._config
        return config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim

    @property
    def _query_panels(self) -> tuple[int, int]:
        """Panels of a KV head with its queries, and how many hold only these; zeros where queries share a panel."""
        _, group, size = self._heads
        if group * size % PANEL or 2 * size % PANEL:
            return 0, 0
        return (group + 2) * size // PANEL, group * size // PANEL

    def _pages_of(self, layer: int) -> tuple[int, ...]:
        """Kind, the layer's keys, bytes of a head, its values, bytes of a head, bytes of a token's values."""
        keys, values = self._pages.keys[layer], self._pages.values[layer]
        token_bytes = self._pages.width * values.itemsize
        ends = (keys.data_ptr(), keys[0, 0].nbytes, values.data_ptr(), values[0, 0].nbytes)
        return PAGE_KINDS[keys.dtype], *ends, token_bytes

    def _feedforward(
        self,
        which: int,
        mlp: Feedforward,
        x: _Input,
        y: _Buffer,
        rows: int,
        *,
        layer: int | None = None,
        offsets: int = 0,
        add: bool = True,
    ) -> None:
        narrow = self._input(rows, mlp.down.inputs, shared="narrow")
        if mlp.interleaved:
            self._multiply(which, mlp.up, x, narrow.exact, offsets=offsets, gated=True)
            if mlp.down.is_quantised:
                self._normalise(which, None, narrow.exact, narrow, mlp.down)
            self._multiply(which, mlp.down, narrow, y, add=add, offsets=offsets)
            return
        wide = self._buffer(rows, mlp.up.outputs, shared="wide")
        size = mlp.up.outputs // (2 if mlp.gated else 1)
        self._multiply(which, mlp.up, x, wide, offsets=offsets)
        if layer is not None and mlp.gated:
            self._adapt(which, layer, 2, x, self._config.hidden_size, wide)
        self._add(
            Code.ACTIVATE, which, mlp.activation, *wide.ends, size, int(mlp.gated), *narrow.exact.ends,
            *narrow.quantised(mlp.down),
        )  # fmt: skip
        self._multiply(which, mlp.down, narrow, y, add=add, offsets=offsets)
        if layer is not None and mlp.gated:
            self._adapt(which, layer, 3, narrow, self._config.intermediate_size, y)

    def _mixture(self, which: int, mixture: Mixture, norm: Norm, stream: _Buffer, normed: _Input) -> None:
        rows, chosen = self.rows, mixture.chosen
        first = mixture.shared.up if mixture.shared is not None else mixture.experts.up
        self._normalise(which, norm, stream, normed, first)
        scores = self._buffer(rows, mixture.router.outputs, shared="scores")
        self._multiply(which, mixture.router, normed, scores)
        weights, places, owners = (
            self._keep(np.zeros(rows * chosen, kind)) for kind in (np.float32, np.int32, np.int32)
        )
        offsets = self._keep(np.zeros(mixture.num_experts + 1, np.int32))
        bias = 0 if mixture.bias is None else self._at(mixture.bias)
        self._add(Code.ROUTE, which, *scores.ends, mixture.num_experts, chosen, bias, weights, places, owners, offsets)
        spread = self._input(rows * chosen, normed.exact.width, shared="spread")
        each = which + CHOICES
        self._normalise(each, None, normed.exact, spread, mixture.experts.up, gather=owners)
        results = self._buffer(rows * chosen, mixture.experts.down.outputs, shared="results")
        self._feedforward(each, mixture.experts, spread, results, rows * chosen, offsets=offsets, add=False)
        self._add(Code.COMBINE, which, *results.ends, chosen, weights, places, self._config.hidden_size, *stream.ends)
        if mixture.shared is not None:
            self._feedforward(which, mixture.shared, normed, stream, rows)

    # ---- buffers ---------------------------------------------------------------------------------------------------

    def _add(self, *numbers: int) -> None:
        self._ops.append([int(number) for number in numbers])

    def _at(self, tensor: Tensor | NDArray[Any]) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr() if isinstance(tensor, Tensor) else tensor.ctypes.data

    def _keep(self, array: NDArray[Any]) -> int:
        return self._at(array)

    def _buffer(self, rows: int, width: int, *, shared: str = "", apart: bool = True) -> _Buffer:
        """Rows of float32; what is `shared` under a name is the same memory in every layer.

        Rows lie `apart` by a line of the caches: at a distance of 4 KiB twelve of them would fill one set.
        """
        key = (shared, rows, width)
        buffer = self._shared.get(key)
        if buffer is None or not shared:
            buffer = _Buffer(zeros((rows, width + 16 * apart), np.float32)[:, :width])
            self._shared[key] = buffer
            self._kept.append(buffer)
        return buffer

    def _input(self, rows: int, width: int, *, shared: str = "") -> _Input:
        """The same with their codes, for a product to read."""
        key = (shared, rows, width)
        made = self._shared_inputs.get(key)
        if made is None or not shared:
            made = _Input(
                self._buffer(rows, width),
                _Buffer(zeros((rows, width), np.int8)),
                np.zeros(rows, np.float32),
                np.zeros((rows, width // GROUP), np.int32),
            )
            self._shared_inputs[key] = made
            self._kept.append(made)
        return made


@dataclass(frozen=True)
class _Buffer:
    """Rows of numbers."""

    data: NDArray[Any]

    @property
    def address(self) -> int:
        """Where they begin."""
        return self.data.ctypes.data

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.data.shape[1]

    @property
    def ends(self) -> tuple[int, int]:
        """Address, and bytes from row to row."""
        return self.address, self.data.strides[0]


@dataclass(frozen=True)
class _Input:
    """What a product reads: float32 rows, and beside them the same as int8 with scales and sums of groups."""

    exact: _Buffer
    codes: _Buffer
    scales: NDArray[np.float32]
    sums: NDArray[np.int32]

    def quantised(self, reader: Packed) -> Sequence[int]:
        """The last arguments of an operation that writes this for `reader`."""
        if not reader.is_quantised:
            return _NOT_QUANTISED
        vectors = reader.inputs // 16 // reader.groups
        where = (self.scales.ctypes.data, self.sums.ctypes.data)
        return (*self.codes.ends, *where, 4 * reader.groups, reader.groups, vectors)


def _rotary(config: ModelConfig) -> tuple[Tensor, Tensor] | None:
    if config.positions.kind != "rope":
        return None
    table = RotaryTable(config.head_dim, config.max_positions, config.rope_theta, config.positions.scaling)
    turned = table.prefix(config.max_positions, torch.device("cpu"), torch.float32)
    return turned.cos[0, :, 0].contiguous(), turned.sin[0, :, 0].contiguous()


def _up(size: int) -> int:
    return -(-size // PANEL) * PANEL
