"""A decoder's weights as the operations read them: packed matrices, block by block.

E experts, D hidden, F intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sihe.models.attention import Attention
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.mlp import GatedMLP, PlainMLP
from sihe.models.moe import MixtureOfExperts
from sihe.models.transformer import Block
from sihe.serving.engine.compute.cpu.kernels import ACTIVATIONS, Kind, NormKind
from sihe.serving.engine.compute.cpu.tiles import PANEL
from sihe.serving.engine.compute.cpu.weights import Packed, pack


@dataclass(frozen=True)
class Feedforward:
    """Up (with its gate) and down, and what is between.

    `interleaved` are gate and up in one panel, 16 columns each, so that the product itself lets through what the gate
    opens. Adapters change gate and up before that, and want them one behind the other.
    """

    up: Packed
    down: Packed
    activation: int
    gated: bool
    interleaved: bool = False


@dataclass(frozen=True)
class Mixture:
    """The router, its experts, and the expert that all tokens share."""

    router: Packed
    experts: Feedforward
    shared: Feedforward | None
    bias: Tensor | None  # [E], added for choosing
    num_experts: int
    chosen: int


@dataclass(frozen=True)
class Norm:
    """Weights of one norm."""

    kind: NormKind
    weight: Tensor
    bias: Tensor
    eps: Tensor

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        """The norm that `module` computes."""
        weight, eps = module.weight, torch.tensor([float(module.eps)])  # type: ignore[arg-type]  # both norms have it
        assert isinstance(weight, Tensor)
        if isinstance(module, nn.LayerNorm):
            bias = torch.zeros_like(weight) if module.bias is None else module.bias
            return cls(NormKind.LAYER, _floats(weight), _floats(bias), eps)
        return cls(NormKind.RMS, _floats(weight), torch.zeros(0), eps)


@dataclass(frozen=True)
class Layer:
    """One block."""

    attention_norm: Norm
    qkv: Packed
    query_norm: Norm | None
    key_norm: Norm | None
    out: Packed
    mlp_norm: Norm
    mlp: Feedforward | Mixture


class Weights:
    """A decoder's weights, packed; unless `model` is to `keep` them they are taken out of it, block after block.

    For `interleaved` see `Feedforward`.
    """

    def __init__(self, model: Decoder, kind: Kind, head: Kind, *, keep: bool, interleaved: bool) -> None:
        config = model.config
        table = model.embedding.weight.detach()
        self.head = pack(model.head_weight, head)
        self.embedding = table.float() if kind is Kind.FLOAT32 else table.bfloat16()
        self.places = _places(model)
        self.norm = Norm.of(model.norm)
        self.layers: list[Layer] = []
        for block in model.blocks:
            assert isinstance(block, Block)
            attention = block.attention
            assert isinstance(attention, Attention)
            self.layers.append(
                Layer(
                    Norm.of(block.attention_norm),
                    pack(attention.qkv.weight, kind, attention.qkv.bias),
                    None if attention.q_norm is None else Norm.of(attention.q_norm),
                    None if attention.k_norm is None else Norm.of(attention.k_norm),
                    pack(attention.out.weight, kind, attention.out.bias),
                    Norm.of(block.mlp_norm),
                    _mlp(block.mlp, config, kind, interleaved),
                )
            )
            if not keep:
                block.to("meta")

    def outputs(self, layer: int) -> tuple[int, int, int, int]:
        """Padded outputs of the products that adapters can change: qkv, out, gate and up, down."""
        found = self.layers[layer]
        mlp = found.mlp
        up, down = (0, 0) if isinstance(mlp, Mixture) else (mlp.up.outputs, mlp.down.outputs)
        return found.qkv.outputs, found.out.outputs, up, down

    @property
    def size_bytes(self) -> int:
        """Bytes of weights that one token reads (of a mixture: all experts)."""
        matrices = [self.head]
        for layer in self.layers:
            matrices += [layer.qkv, layer.out]
            mlp = layer.mlp
            both = (mlp.experts, mlp.shared) if isinstance(mlp, Mixture) else (mlp,)
            matrices += [matrix for part in both if part is not None for matrix in (part.up, part.down)]
        return sum(matrix.size_bytes for matrix in matrices)


def _mlp(module: nn.Module, config: ModelConfig, kind: Kind, interleaved: bool) -> Feedforward | Mixture:
    if isinstance(module, MixtureOfExperts):
        experts = _gated(module.gate_up, module.down, kind, interleaved)
        inner = module.shared
        shared = None if inner is None else _gated(inner.gate_up.weight[None], inner.down.weight, kind, interleaved)
        steps = module.balance_steps
        bias = None if steps is None else (steps * 1e-3).float().contiguous()
        router = pack(module.router.weight, Kind.FLOAT32)
        return Mixture(router, experts, shared, bias, module.num_experts, module.experts_per_token)
    if isinstance(module, GatedMLP):
        return _gated(module.gate_up.weight[None], module.down.weight, kind, interleaved)
    assert isinstance(module, PlainMLP)
    activation = ACTIVATIONS.index(config.layers.activation)
    up, down = module.up, module.down
    return Feedforward(pack(up.weight, kind, up.bias), pack(down.weight, kind, down.bias), activation, False)


def _gated(gate_up_E2FD: Tensor, down: Tensor, kind: Kind, interleaved: bool) -> Feedforward:
    up = pack(_gate_up(gate_up_E2FD, interleaved), kind)
    return Feedforward(up, pack(down, kind), ACTIVATIONS.index("silu"), True, interleaved)


def _gate_up(weight_E2FD: Tensor, interleaved: bool) -> Tensor:
    """[E, gate | up, D], each half padded so that it begins on a whole panel; `interleaved` by halves of panels."""
    rest = -weight_E2FD.shape[2] % PANEL
    padded_E2FD = nn.functional.pad(weight_E2FD.detach(), (0, 0, 0, rest))
    if interleaved:
        experts, halves, _, inputs = padded_E2FD.shape
        padded_E2FD = padded_E2FD.view(experts, halves, -1, PANEL // 2, inputs).transpose(1, 2).flatten(2, 3)
    return padded_E2FD.flatten(1, 2)


def _places(model: Decoder) -> Tensor | None:
    config = model.config
    if config.positions.kind not in ("learned", "sinusoidal"):
        return None
    places = torch.arange(config.max_positions)
    with torch.inference_mode():
        return _floats(model._position_vectors(places, torch.float32))


def _floats(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous().clone()
