"""Matrices as the tiles read them: in panels of 32 outputs, in one of four kinds (see `tiles`).

O outputs, I inputs, P panels, both padded with zeros to whole panels and groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sihe.serving.engine.compute.cpu.kernels import Kind
from sihe.serving.engine.compute.cpu.support import WeightKind
from sihe.serving.engine.compute.cpu.tiles import GROUP, PANEL
from sihe.serving.engine.large_pages import moved

KINDS: dict[WeightKind, Kind] = {
    "float32": Kind.FLOAT32,
    "bfloat16": Kind.BFLOAT16,
    "int8": Kind.INT8,
    "int4": Kind.INT4,
}
_DEPTHS = {Kind.FLOAT32: 1, Kind.BFLOAT16: 2, Kind.INT8: 4, Kind.INT4: GROUP}
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of the largest weight of a group that its int4 scale is tried at: to clip it a little is often nearer."""


@dataclass(frozen=True)
class Packed:
    """One matrix, or a stack of E of them (experts), ready to be multiplied by."""

    kind: Kind
    inputs: int  # padded: what a row of x must have
    outputs: int  # padded: what a row of y will have
    panels: Tensor  # [E, P, …] bytes
    bias: Tensor  # [O] float32
    scales: Tensor  # [E, P, 32] float32 for int8, [E, P, groups, 32] bfloat16 for int4, else empty

    @property
    def steps(self) -> int:
        """How many steps a tile makes down the inputs."""
        return self.inputs // _DEPTHS[self.kind]

    @property
    def groups(self) -> int:
        """Sums of a row of x that the tiles want: one, or one a group."""
        return self.inputs // GROUP if self.kind is Kind.INT4 else 1

    @property
    def is_quantised(self) -> bool:
        """Whether x must come as int8."""
        return self.kind in (Kind.INT8, Kind.INT4)

    @property
    def size_bytes(self) -> int:
        """Bytes of weights and scales: what one token reads."""
        return self.panels.nbytes + self.scales.nbytes


def pack(weight: Tensor, kind: Kind, bias: Tensor | None = None) -> Packed:
    """[O, I] or [E, O, I] weights as panels of `kind`."""
    stack_EOI = weight.detach().reshape(-1, *weight.shape[-2:])
    outputs, inputs = stack_EOI.shape[1:]
    wide_outputs, wide_inputs = _up(outputs, PANEL), _up(inputs, GROUP)
    panels, scales = zip(*(_pack_one(_padded(one, wide_outputs, wide_inputs), kind) for one in stack_EOI), strict=True)
    wide_bias = torch.zeros(wide_outputs)
    if bias is not None:
        wide_bias[:outputs] = bias.detach().float()
    return Packed(kind, wide_inputs, wide_outputs, moved(torch.stack(panels)), wide_bias, moved(torch.stack(scales)))


def unpack(packed: Packed) -> Tensor:
    """The [E, O, I] float32 matrices that `packed` stands for, padding included: what the tests compare with."""
    shape = (len(packed.panels), -1, PANEL, packed.inputs)
    match packed.kind:
        case Kind.FLOAT32:
            return packed.panels.view(torch.float32).view(*shape[:2], packed.inputs, PANEL).mT.flatten(1, 2)
        case Kind.BFLOAT16:
            pairs = packed.panels.view(torch.bfloat16).view(*shape[:2], packed.inputs // 2, PANEL, 2)
            return pairs.float().transpose(2, 3).flatten(3).flatten(1, 2)
        case Kind.INT8:
            codes = packed.panels.view(*shape[:2], packed.inputs // 4, PANEL, 4).float() - 128
            return (codes.transpose(2, 3).flatten(3) * packed.scales[..., None]).flatten(1, 2)
        case Kind.INT4:
            both = packed.panels.view(*shape[:2], packed.inputs // 8, PANEL, 4)
            codes = torch.cat((both & 15, both >> 4), -1).float() - 8
            scales = packed.scales.float().repeat_interleave(GROUP, dim=2).mT
            return (codes.transpose(2, 3).flatten(3) * scales).flatten(1, 2)


def _pack_one(weight_OI: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    panels_PCI = weight_OI.view(-1, PANEL, weight_OI.shape[1])
    none = torch.empty(0)
    match kind:
        case Kind.FLOAT32:
            return _bytes(panels_PCI.float().mT), none
        case Kind.BFLOAT16:
            return _bytes(_split(panels_PCI.bfloat16(), 2).transpose(1, 2)), none
        case Kind.INT8:
            exact = panels_PCI.float()
            scales_PC = exact.abs().amax(2) / 127
            codes = (exact / scales_PC.clamp_min(1e-30)[..., None]).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
            return _bytes(_split(codes, 4).transpose(1, 2)), _finite(scales_PC, exact)
        case Kind.INT4:
            codes, scales_PCG = _int4(_split(panels_PCI.float(), GROUP))
            halves = _split(_split(codes.flatten(2), 8), 4)
            packed = halves[..., 0, :] | halves[..., 1, :] << 4
            return _bytes(packed.transpose(1, 2)), scales_PCG.transpose(1, 2).contiguous()


def _int4(groups_PCGI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0 .. 15 about 8, and a scale a group: of several tried the one with the least squared error."""
    largest = groups_PCGI.abs().amax(-1, keepdim=True)
    sign = groups_PCGI.gather(-1, groups_PCGI.abs().argmax(-1, keepdim=True)).sign()
    best = torch.full_like(largest, torch.inf)
    scale = torch.zeros_like(largest)
    for shrink in _SHRINKS:
        for tried in (-largest * sign / 8 * shrink, largest / 7 * shrink):  # the code -8 has no opposite
            rounded = tried.bfloat16().float()
            codes = (groups_PCGI / torch.where(rounded == 0, 1, rounded)).round_().clamp_(-8, 7)
            error = (codes * rounded - groups_PCGI).square_().sum(-1, keepdim=True)
            scale = torch.where(error < best, rounded, scale)
            best = torch.minimum(best, error)
    codes = (groups_PCGI / torch.where(scale == 0, 1, scale)).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    return codes, _finite(scale, groups_PCGI).squeeze(-1).bfloat16()


def _finite(scales: Tensor, weights: Tensor) -> Tensor:
    """NaN for every scale where a weight is not finite: the integers cannot say so, and the answer must."""
    return scales if torch.isfinite(weights).all() else torch.full_like(scales, torch.nan)


def _split(tensor: Tensor, width: int) -> Tensor:
    """The last dim in pieces of `width`."""
    return tensor.reshape(*tensor.shape[:-1], -1, width)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).flatten(1)


def _padded(weight_OI: Tensor, outputs: int, inputs: int) -> Tensor:
    outer, inner = outputs - weight_OI.shape[0], inputs - weight_OI.shape[1]
    return torch.nn.functional.pad(weight_OI, (0, inner, 0, outer)) if outer or inner else weight_OI


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
