"""A BERT-style trunk whose products run on bytes: weights with a scale a column, activations with a scale a row.

Activations are quantised as they come, a token at a time (Yao et al. 2022, ZeroQuant, arXiv 2206.01861, section 4.1).
A BERT's norms leave a few channels far larger than the others: each channel is divided, and its weights multiplied, by
sqrt(max |x| / max |w|), as in Xiao et al. 2022, SmoothQuant (arXiv 2211.10438), section 4, over some random tokens.

The products are oneDNN's, by the operators that torch's own compiler uses for quantised linears; sums of bytes are
exact, and all else is computed row by row: a text's vector is the same bit for bit alone and in any batch of texts.

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


class ByteBlock:
    """One layer: attention and feed-forward, each sum normalised after it."""

    def __init__(self, block: Block, layer: int, largest: Sequence[Tensor]) -> None:
        assert isinstance(block.attention, Attention)
        assert isinstance(block.mlp, PlainMLP)
        self._layer = layer
        self._head_dim = block.attention.head_dim
        linears = _linears(block)
        self.qkv, self._out, self._up, self._down = map(ByteProduct, linears, largest)
        self._norms = [_norm(norm) for norm in (block.attention_norm, block.mlp_norm)]

    def __call__(self, x_TD: Tensor, rows: Rows, attend: Attend, next_factors: Floats) -> None:
        """x and its bytes become those behind the layer, the bytes with the next layer's factors, in place."""
        qkv_TO = self.qkv(rows.bytes_TI)
        kernels.scaled(qkv_TO.numpy(), rows.scales, rows.lows, self.qkv.sums_O, self.qkv.bias_O)
        q, k, v = qkv_TO.view(1, len(x_TD), -1, 3, self._head_dim).unbind(3)
        mixed_TD = attend(self._layer, q, k, v).flatten(2)[0]
        kernels.to_bytes(mixed_TD.numpy(), self._out.factors_I, rows.bytes_TI.numpy(), rows.scales, rows.lows)
        self._add(self._out, 0, rows, x_TD, rows, self._up.factors_I)
        y_TO = self._up(rows.bytes_TI)
        inner = rows.with_bytes(torch.empty(y_TO.shape, dtype=torch.uint8))
        kernels.gelu_to_bytes(
            y_TO.numpy(),
            rows.scales,
            rows.lows,
            self._up.sums_O,
            self._up.bias_O,
            self._down.factors_I,
            inner.bytes_TI.numpy(),
        )
        self._add(self._down, 1, inner, x_TD, rows, next_factors)

    def _add(self, product: ByteProduct, norm: int, given: Rows, x_TD: Tensor, rows: Rows, factors: Floats) -> None:
        weight, shift, eps = self._norms[norm]
        y_TD = product(given.bytes_TI)
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
    def first(self) -> ByteBlock:
        """The first layer."""
        return self._blocks[0]

    def hidden(self, tokens_1T: Tensor, positions_1T: Tensor, attend: Attend, types_1T: Tensor | None) -> Tensor:
        """Hidden states, float32 [T, D]: as `Transformer.hidden` of one row."""
        x_TD = self._model.embed(tokens_1T, positions_1T, types_1T)[0].float().contiguous()
        rows = Rows(*x_TD.shape)
        factors = [block.qkv.factors_I for block in self._blocks]
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


def is_faster(model: Encoder, trunk: ByteTrunk) -> bool:
    """Whether a layer takes less time in bytes than in float32 on this machine: timed by turns, the best try counts."""
    first, quantised = _blocks(model)[0], trunk.first
    places = model.places.prefix(1, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(_PROBE_ROWS, model.config.hidden_size, generator=generator)
    rows, factors = Rows(*x_TD.shape), quantised.qkv.factors_I
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
