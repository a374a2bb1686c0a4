"""A BERT-style trunk whose products run on bytes: weights with a scale a column, activations with a scale a row.

Activations are quantised as they come, a token at a time (Yao et al. 2022, ZeroQuant, arXiv 2206.01861, section 4.1).
A BERT's norms leave a few channels far larger than the others: each channel is divided, and its weights multiplied, by
sqrt(max |x| / max |w|), as in Xiao et al. 2022, SmoothQuant (arXiv 2211.10438), section 4, over some random tokens.

The products are oneDNN's, by the operators that torch's own compiler uses for quantised linears; sums of bytes are
exact, and all else is computed row by row: a text's vector is the same bit for bit alone and in any batch of texts,
unless a product had to stay in float32.

More than half of the error comes from the second map of the feed-forward part: what GELU gives is near 0 but for a few
numbers of each row. Where vectors are too far from those of float32, that map stays in float32 in the layers that need
it most (`widen_worst`).

Shapes: T tokens, D hidden, I in, O out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sihe.models.architecture import LayerConfig
from sihe.models.attention import Attention
from sihe.models.config import ModelConfig
from sihe.models.encoder import Encoder
from sihe.models.mlp import PlainMLP
from sihe.models.ports import Attend
from sihe.models.transformer import Block, Transformer
from sihe.serving.engine.encoder import kernels
from sihe.serving.engine.encoder.types import Floats

_PROBE_ROWS = 256  # of the products that are timed at load: half of the usual batch
_PROBE_TEXTS, _PROBE_TOKENS = 16, 32  # of random tokens, that tell which channels are large
_TRIES = 3
_QKV, _OUT, _UP, _DOWN = range(4)  # the products of a layer
_WORST = (_DOWN, _UP)  # those that cost most of a vector's precision; together they are two thirds of the work
# Of the vector of a text of random tokens to that of float32, below which int8 would not be the same model. With it the
# lowest of 400 lines of this documentation was .9992 on all-MiniLM-L6-v2, and .9971 with every product in bytes.
LEAST_COSINE = 0.9993


def can_quantise(config: ModelConfig) -> bool:
    """Whether there is such a trunk for a model: a BERT or its kin, with GELU, on a CPU that torch has oneDNN for."""
    usual = LayerConfig(
        norm="layer",
        norm_first=False,
        gated=False,
        activation="gelu",
        mlp_bias=True,
        embedding_norm=True,
        token_types=config.layers.token_types,
    )
    shape = config.attention
    is_bert = config.task != "next_token" and config.layers == usual and shape.qkv_bias and shape.out_bias
    return is_bert and config.num_experts == 0 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's own


class Rows:
    """Rows of numbers as bytes: x = low + scale * byte, times the factors of the product that they are for."""

    def __init__(self, rows: int, size: int) -> None:
        self.bytes_TI = torch.empty(rows, size, dtype=torch.uint8)
        self.scales, self.lows = np.empty(rows, np.float32), np.empty(rows, np.float32)

    def with_bytes(self, bytes_TI: Tensor) -> Rows:
        """Other bytes with these scales and lows."""
        other = Rows(0, 0)
        other.bytes_TI, other.scales, other.lows = bytes_TI, self.scales, self.lows
        return other


class ByteProduct:
    """A linear map in bytes. `largest_I` are the largest inputs of each channel that were seen."""

    def __init__(self, linear: nn.Linear, largest_I: Tensor) -> None:
        w_OI = linear.weight.detach().float()
        smooth_I = (largest_I.clamp_min(1e-5) / w_OI.abs().amax(0).clamp_min(1e-5)).sqrt()
        w_OI = w_OI * smooth_I
        self.factors_I: Floats = (1 / smooth_I).numpy()
        self._scales_O = w_OI.abs().amax(1).clamp_min(1e-30) / 127
        self._zeros_O = torch.zeros(len(w_OI), dtype=torch.int64)
        codes_OI = (w_OI / self._scales_O[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(codes_OI, [_PROBE_ROWS, w_OI.shape[1]])
        self.sums_O: Floats = (codes_OI.sum(1) * self._scales_O).float().numpy()
        self.bias_O: Floats = linear.bias.detach().float().numpy()

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, I] bytes → [T, O] float32, without the rows' scales and lows and without the bias."""
        y_TO: Tensor = torch.ops.onednn.qlinear_pointwise(
            x_TI, 1.0, 0, self._packed, self._scales_O, self._zeros_O, None, 1.0, 0, torch.float32, "none", [], "none"
        )
        return y_TO


class WideProduct:
    """A linear map in float32, with the face of one in bytes: what it gives has the scale 1 and the low 0."""

    def __init__(self, linear: nn.Linear) -> None:
        self._w_OI = linear.weight.detach().float()
        self.factors_I: Floats = np.ones(self._w_OI.shape[1], np.float32)
        self.sums_O: Floats = np.zeros(len(self._w_OI), np.float32)
        self.bias_O: Floats = linear.bias.detach().float().numpy()

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, I] → [T, O], float32, without the bias."""
        return nn.functional.linear(x_TI, self._w_OI)


Product = ByteProduct | WideProduct


class ByteBlock:
    """One layer: attention and feed-forward, each sum normalised after it."""

    def __init__(self, block: Block, layer: int, largest: Sequence[Tensor]) -> None:
        assert isinstance(block.attention, Attention)
        self._layer = layer
        self._head_dim = block.attention.head_dim
        self._sources = list(zip(_linears(block), largest, strict=True))
        self._products: list[Product] = [ByteProduct(*source) for source in self._sources]
        self._norms = [_norm(norm) for norm in (block.attention_norm, block.mlp_norm)]

    @property
    def factors(self) -> Floats:
        """By which the bytes that come in are to be multiplied."""
        return self._products[_QKV].factors_I

    @property
    def wide(self) -> list[int]:
        """The products that are computed in float32."""
        return [place for place, product in enumerate(self._products) if isinstance(product, WideProduct)]

    def set_wide(self, place: int, wide: bool) -> None:
        """Whether one of its products is computed in float32."""
        linear, largest = self._sources[place]
        self._products[place] = WideProduct(linear) if wide else ByteProduct(linear, largest)

    def settle(self) -> None:
        """They stay as they are: lets go of what it would take to change them."""
        self._sources = []

    def __call__(self, x_TD: Tensor, rows: Rows, attend: Attend, next_factors: Floats) -> None:
        """x and its bytes become those behind the layer, the bytes with the next layer's factors, in place."""
        qkv, out, up, down = self._products
        qkv_TO = _times(qkv, x_TD, rows)
        kernels.scaled(qkv_TO.numpy(), rows.scales, rows.lows, qkv.sums_O, qkv.bias_O)
        q, k, v = qkv_TO.view(1, len(x_TD), -1, 3, self._head_dim).unbind(3)
        mixed_TD = attend(self._layer, q, k, v).flatten(2)[0]
        if isinstance(out, ByteProduct):
            kernels.to_bytes(mixed_TD.numpy(), out.factors_I, rows.bytes_TI.numpy(), rows.scales, rows.lows)
        self._add(out, 0, _times(out, mixed_TD, rows), x_TD, rows, up.factors_I)
        y_TO = _times(up, x_TD, rows)
        if isinstance(down, ByteProduct):
            inner = rows.with_bytes(torch.empty(y_TO.shape, dtype=torch.uint8))
            kernels.gelu_to_bytes(
                y_TO.numpy(), rows.scales, rows.lows, up.sums_O, up.bias_O, down.factors_I, inner.bytes_TI.numpy()
            )
        else:
            inner = rows
            kernels.gelu(y_TO.numpy(), rows.scales, rows.lows, up.sums_O, up.bias_O)
        self._add(down, 1, _times(down, y_TO, inner), x_TD, rows, next_factors)

    def _add(self, product: Product, norm: int, y_TD: Tensor, x_TD: Tensor, rows: Rows, factors: Floats) -> None:
        weight, shift, eps = self._norms[norm]
        kernels.add_norm_to_bytes(
            y_TD.numpy(),
            rows.scales,
            rows.lows,
            product.sums_O,
            product.bias_O,
            x_TD.numpy(),
            weight,
            shift,
            eps,
            factors,
            rows.bytes_TI.numpy(),
        )


def _times(product: Product, x_TI: Tensor, rows: Rows) -> Tensor:
    """A product of x or of its bytes; the rows' scales and lows are those of what comes out."""
    if isinstance(product, ByteProduct):
        return product(rows.bytes_TI)
    rows.scales.fill(1)
    rows.lows.fill(0)
    return product(x_TI)


class ByteTrunk:
    """The blocks of an encoder in bytes. `model` keeps what is not in them: embeddings, and what comes behind."""

    def __init__(self, model: Encoder) -> None:
        largest = _largest_inputs(model)
        self._blocks = [
            ByteBlock(block, layer, [largest[linear] for linear in _linears(block)])
            for layer, block in enumerate(_blocks(model))
        ]
        self._model = model

    @property
    def blocks(self) -> Sequence[ByteBlock]:
        """The layers in their order."""
        return self._blocks

    @property
    def wide(self) -> list[tuple[int, int]]:
        """The products that are computed in float32: of which layer, and which of its four."""
        return [(layer, place) for layer, block in enumerate(self._blocks) for place in block.wide]

    def settle(self) -> None:
        """The products stay as they are: lets go of what it would take to change them."""
        for block in self._blocks:
            block.settle()

    def hidden(self, tokens_1T: Tensor, positions_1T: Tensor, attend: Attend, types_1T: Tensor | None) -> Tensor:
        """Hidden states, float32 [T, D]: as `Transformer.hidden` of one row."""
        x_TD = self._model.embed(tokens_1T, positions_1T, types_1T)[0].float().contiguous()
        rows = Rows(*x_TD.shape)
        factors = [block.factors for block in self._blocks]
        kernels.to_bytes(x_TD.clone().numpy(), factors[0], rows.bytes_TI.numpy(), rows.scales, rows.lows)
        for block, next_factors in zip(self._blocks, [*factors[1:], factors[0]], strict=True):
            block(x_TD, rows, attend, next_factors)
        return x_TD


def _largest_inputs(model: Encoder) -> dict[nn.Linear, Tensor]:
    """The largest number, without its sign, in each channel of each product's input, over texts of random tokens."""
    found: dict[nn.Linear, Tensor] = {}

    def see(linear: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        largest_I = given[0].float().abs().nan_to_num(0, 0).flatten(0, -2).amax(0)
        found[linear] = torch.maximum(largest_I, found[linear]) if linear in found else largest_I

    linears = [linear for block in _blocks(model) for linear in _linears(block)]
    hooks = [linear.register_forward_pre_hook(see) for linear in linears]
    length = min(_PROBE_TOKENS, model.config.max_positions)
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.inference_mode():
            model.hidden(torch.randint(model.config.vocab_size, (_PROBE_TEXTS, length), generator=generator))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def widen_worst(trunk: ByteTrunk, cosines: Callable[[], Floats]) -> float:
    """Computes as little in float32 as it takes for the lowest of `cosines()` to be `LEAST_COSINE`; the lowest then.

    `cosines` compares answers of the trunk, as it is at that moment, with those of float32. One kind of product after
    the other is looked at, in the order of `_WORST`, and which layers gain most by it is measured. What is returned may
    be lower, where even all of that is not enough.
    """
    lowest = float(cosines().min())
    for place in _WORST:
        if lowest >= LEAST_COSINE:
            break
        gains = []
        for layer, block in enumerate(trunk.blocks):
            block.set_wide(place, True)
            gains.append((float(cosines().mean()), layer))
            block.set_wide(place, False)
        for _, layer in sorted(gains, reverse=True):
            trunk.blocks[layer].set_wide(place, True)
            lowest = float(cosines().min())
            if lowest >= LEAST_COSINE:
                break
    return lowest


def is_faster(model: Encoder, trunk: ByteTrunk) -> bool:
    """Whether a layer takes less time in bytes than in float32 on this machine: timed by turns, the best try counts."""
    first, quantised = _blocks(model)[0], trunk.blocks[0]
    places = model.places.prefix(1, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(_PROBE_ROWS, model.config.hidden_size, generator=generator)
    rows, factors = Rows(*x_TD.shape), quantised.factors
    kernels.to_bytes(x_TD.clone().numpy(), factors, rows.bytes_TI.numpy(), rows.scales, rows.lows)

    class _Values:
        causal, window = False, None

        def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
            return v_BTKH.contiguous()  # attention costs the same in both

    def in_floats() -> None:
        first(x_TD[None], places, _Values())

    def in_bytes() -> None:
        quantised(x_TD.clone(), rows, _Values(), factors)

    with torch.inference_mode():
        for run in (in_floats, in_bytes):
            run()  # compiles, and chooses kernels
        seconds = [[_seconds(run) for run in (in_floats, in_bytes)] for _ in range(_TRIES)]
    float_s, byte_s = (min(each) for each in zip(*seconds, strict=True))
    return byte_s < float_s


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _blocks(model: Transformer) -> Sequence[Block]:
    blocks = list(model.blocks)
    assert all(isinstance(block, Block) for block in blocks)
    return blocks  # type: ignore[return-value]  # checked just above


def _linears(block: Block) -> tuple[nn.Linear, ...]:
    """The products of a layer, in their order."""
    assert isinstance(block.attention, Attention)
    assert isinstance(block.mlp, PlainMLP)
    return block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down


def _norm(norm: nn.Module) -> tuple[Floats, Floats, np.float32]:
    assert isinstance(norm, nn.LayerNorm)
    return norm.weight.detach().float().numpy(), norm.bias.detach().float().numpy(), np.float32(norm.eps)
