"""Products whose weights are kept in 8 or 4 bits, made from a trained decoder.

    O  outputs      D  inputs      G  groups of a row      S  weights of a group (64)      P  packed pairs of a row

Weights are stored as codes and steps, and become numbers again for the moment of a product; its backward pass decodes
them a second time in place of keeping them. So gradients reach the input, and adapters on top can learn (QLoRA:
Dettmers et al. 2023, arXiv 2305.14314), while the weights themselves are frozen.

    int8   one step a row, symmetric: w = step · code
    int4   one step and one minimum a group: w = minimum + step · code
    nf4    one scale a group, codes name 16 quantiles of the normal distribution: w = scale · level[code]; the scales
           themselves are kept in 8 bits (double quantisation, section 3 of the paper)

torch's own kernels for such weights (`_weight_int8pack_mm`, `_weight_int4pack_mm_for_cpu`) are not used: in float32 on
a processor with AVX2, torch 2.13, the first took as long as decoding and multiplying for 1 row of input, 9 times as
long for 8 rows and 25 times for 64, and the second longer still.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sihe.core.errors import ConfigError, InvalidInput
from sihe.models import products
from sihe.models.decoder import Decoder
from sihe.models.mlp import GateUp

Scheme = Literal["int8", "int4", "nf4"]
SKIP = ("head", "embedding", "router")
"""What stays as it is: few weights for what an error in them would cost."""
GROUP = 64  # weights that share a scale: section 3 of arXiv 2305.14314
_SCALES = 256  # scales that share a step of the second quantisation: the same section


def _normal_levels() -> tuple[float, ...]:
    """The 16 levels of NF4: quantiles of the normal distribution, 7 below zero, zero, 8 above, scaled to [-1, 1].

    Source: arXiv 2305.14314, section 3; the outermost quantile is the mean of those of 15 and of 16 levels.
    """
    edge = 1 - (1 / 32 + 1 / 30) / 2

    def half(count: int) -> list[float]:
        return [NormalDist().inv_cdf(edge + (0.5 - edge) * i / count) for i in range(count)]

    levels = [*(-level for level in half(7)), 0.0, *reversed(half(8))]
    return tuple(level / levels[-1] for level in levels)


NF4_LEVELS = _normal_levels()


class QuantisedLinear(nn.Module):
    """A product with coded weights in place of an `nn.Linear` or a `GateUp`. Computes in the dtype of its input.

    `shape` is that of the weight it replaces: [O, D] or, for gate and up, [2, I, D].
    """

    codes: Tensor

    def __init__(self, shape: tuple[int, ...], scheme: Scheme, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.scheme = scheme
        self.bias = bias
        rows, columns = torch.Size(shape[:-1]).numel(), shape[-1]
        for name, buffer in _encode(torch.empty(rows, columns, device="meta"), scheme).items():
            self.register_buffer(name, buffer)

    @classmethod
    def of(cls, weight: Tensor, scheme: Scheme, bias: nn.Parameter | None = None) -> QuantisedLinear:
        """The product by `weight`, each number at the nearest that the scheme can say."""
        made = cls(tuple(weight.shape), scheme, bias)
        for name, buffer in _encode(weight.detach().flatten(0, -2).float(), scheme).items():
            setattr(made, name, buffer)
        return made

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers, [O, D]."""
        return _decode(dict(self.named_buffers()), self.scheme, self.shape[-1]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., O]."""
        output: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{list(self.shape)}, {self.scheme}"


class _Product(torch.autograd.Function):
    """x Wᵀ and, back, dy W, with W decoded each time and kept neither time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return products.linear(x, linear.dequantised(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return products.linear(grad, ctx.linear.dequantised(grad.dtype).T), None


def quantise(model: Decoder, scheme: Scheme, skip: tuple[str, ...] = SKIP) -> None:
    """Replaces the products of `model` by coded ones, in place and one at a time, and freezes what is left.

    `skip` are module names, or parts of dotted ones, that stay. Raises `ConfigError` for an unknown scheme,
    `InvalidInput` for a model with adapters: they go on top afterwards.
    """
    check_scheme(scheme)
    if any(name.rpartition(".")[2] == "lora" for name, _ in model.named_modules()):
        raise InvalidInput("the model carries adapters: quantise it first, then apply them")
    model.requires_grad_(False)
    for parent, name, product in _products(model, skip):
        weight = product.get_parameter("weight")
        parent.add_module(name, QuantisedLinear.of(weight, scheme, getattr(product, "bias", None)))


def dequantise(model: Decoder, dtype: torch.dtype = torch.float32) -> None:
    """Gives every coded product its plain form again, with the numbers that the codes stand for."""
    found = [name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)]
    for path in found:
        parent_path, _, name = path.rpartition(".")
        coded = model.get_submodule(path)
        assert isinstance(coded, QuantisedLinear)
        if "lora" in dict(coded.named_children()):
            raise InvalidInput("the model carries adapters: detach them, dequantise, then apply them again")
        plain: nn.Module
        with torch.device("meta"):
            if len(coded.shape) == 3:
                plain = GateUp(coded.shape[2], coded.shape[1])
            else:
                plain = products.Linear(coded.shape[1], coded.shape[0], bias=False)
                plain.register_parameter("bias", coded.bias)
        plain.register_parameter(
            "weight", nn.Parameter(coded.dequantised(dtype).view(coded.shape), requires_grad=False)
        )
        model.get_submodule(parent_path).add_module(name, plain)


def replace_empty(model: Decoder, scheme: Scheme, skip: tuple[str, ...] = SKIP) -> None:
    """As `quantise`, without any numbers: for a model whose codes are read from a file."""
    check_scheme(scheme)
    for parent, name, product in _products(model, skip):
        shape = tuple(product.get_parameter("weight").shape)
        parent.add_module(name, QuantisedLinear(shape, scheme, getattr(product, "bias", None)))


def check_scheme(scheme: object) -> None:
    """Raises `ConfigError` for an unknown scheme."""
    if scheme not in get_args(Scheme):
        raise ConfigError(
            f"a scheme is one of {', '.join(get_args(Scheme))}, got {scheme!r}", key="quantisation.scheme"
        )


def memory_bytes(model: nn.Module) -> int:
    """Bytes of all weights, codes and steps; what is shared counts once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _products(model: Decoder, skip: tuple[str, ...]) -> list[tuple[nn.Module, str, nn.Module]]:
    """The products to replace: parent, name in it, module."""
    return [
        (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, GateUp)) and path not in skip and not set(path.split(".")) & set(skip)
    ]


# ---- codes ---------------------------------------------------------------------------------------------------------


def _encode(w_OD: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Codes and steps of a matrix, by the names of the buffers."""
    if scheme == "int8":
        step_O1 = _steps(w_OD.abs().amax(1, keepdim=True) / 127)
        return {"codes": (w_OD / step_O1).round().to(torch.int8), "step": step_O1}
    # A last group that is not full repeats the row's last weight, which widens no group's range.
    missing = -w_OD.shape[1] % GROUP
    w_OGS = _grouped(torch.cat([w_OD, w_OD[:, -1:].expand(-1, missing)], dim=1))
    if scheme == "int4":
        low_OG1, high_OG1 = w_OGS.amin(2, keepdim=True), w_OGS.amax(2, keepdim=True)
        step_OG1 = _steps((high_OG1 - low_OG1) / 15)
        codes = ((w_OGS - low_OG1) / step_OG1).round().clamp(0, 15)
        return {"codes": _pack(codes.to(torch.uint8).flatten(1)), "step": step_OG1, "minimum": low_OG1}
    scales = _encode_scales(w_OGS.abs().amax(2).flatten())
    # The codes are chosen for the scales as they will be read back.
    scale_OG1 = _decode_scales(scales, w_OGS.shape[:2].numel()).view(*w_OGS.shape[:2], 1)
    levels = torch.tensor(NF4_LEVELS, device=w_OGS.device)
    codes = torch.bucketize(w_OGS / scale_OG1, (levels[1:] + levels[:-1]) / 2)
    return {"codes": _pack(codes.to(torch.uint8).flatten(1)), **scales}


def _decode(buffers: dict[str, Tensor], scheme: Scheme, columns: int) -> Tensor:
    """The float32 matrix [O, D] behind codes and steps."""
    codes = buffers["codes"]
    if scheme == "int8":
        return codes * buffers["step"]
    if scheme == "int4":
        w_OGS = _grouped(_unpack(codes, tuple(map(float, range(16)))))
        return torch.addcmul(buffers["minimum"], w_OGS, buffers["step"]).flatten(1)[:, :columns]
    w_OGS = _grouped(_unpack(codes, NF4_LEVELS))
    scale = _decode_scales(buffers, w_OGS.shape[:2].numel())
    return w_OGS.mul_(scale.view(*w_OGS.shape[:2], 1)).flatten(1)[:, :columns]


def _grouped(w_OD: Tensor) -> Tensor:
    """[O, D] → [O, G, S]."""
    return w_OD.view(w_OD.shape[0], -1, GROUP)


def _steps(step: Tensor) -> Tensor:
    """Steps without zeros: where all weights are alike any step says them."""
    return torch.where(step > 0, step, 1.0)


def _pack(codes: Tensor) -> Tensor:
    """Two codes of 4 bits a byte, the first in the low half."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def _unpack(packed_OP: Tensor, values: tuple[float, ...]) -> Tensor:
    """The values of packed codes, [O, 2 P], by one look-up of pairs."""
    table = torch.tensor([(values[byte & 15], values[byte >> 4]) for byte in range(256)], device=packed_OP.device)
    return functional.embedding(packed_OP.int(), table).flatten(1)


def _encode_scales(scale: Tensor) -> dict[str, Tensor]:
    """Scales less their mean in 8 bits, with a step for every 256 of them (double quantisation)."""
    mean = scale.mean()
    blocks = functional.pad(scale - mean, (0, -len(scale) % _SCALES)).view(-1, _SCALES)
    step = _steps(blocks.abs().amax(1, keepdim=True) / 127)
    codes = (blocks / step).round().to(torch.int8).flatten()[: len(scale)]
    return {"scale_codes": codes, "scale_step": step, "scale_mean": mean}


def _decode_scales(buffers: dict[str, Tensor], count: int) -> Tensor:
    """The scales in turn, all above zero."""
    step = buffers["scale_step"].expand(-1, _SCALES).flatten()[:count]
    return torch.addcmul(buffers["scale_mean"], buffers["scale_codes"], step).clamp(min=1e-12)
