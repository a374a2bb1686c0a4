"""Numbers in 8 bits, block by block, for states that only need a few significant digits over many magnitudes.

Each block of 256 neighbours is divided by its entry of the largest magnitude, and each quotient is replaced by the
nearest of 256 values that lie dense near 0: dynamic tree quantisation (Dettmers et al. 2022, arXiv 2110.02861, section
2.1 and figure 2; Dettmers 2016, arXiv 1511.04561). Two things differ from the paper, both on purpose:

- The divisor keeps its sign. The largest entry is then exactly the value 1, so that what was unpacked packs into the
  same codes again: states can travel as float32 and come back bit for bit.
- The map for squares has no 0. A variance of 0 beside a mean that is not would give an update of mean / eps
  (Li et al. 2023, arXiv 2309.01507, section 4.1).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256  # entries; the paper's 2048 suits a GPU's kernels, smaller blocks confine an outlier further
_MAGNITUDES = 7  # powers of ten that the map spans, as in the paper
# Codes are looked up by sign, exponent and 9 bits of mantissa: bins of 2^-9 where the map's values are 2^-7 apart or
# more, so that a value's own bin has its code. Measured, 10 ns a number; a binary search among the values takes 50.
_DROPPED = 14
_BINS = 1 << (32 - _DROPPED)


def quantise(values: Tensor, codes: Tensor, scales: Tensor, *, is_signed: bool) -> None:
    """Writes the codes (uint8, of the shape of `values`) and the divisors (float32 [blocks]) in place."""
    blocks = _blocks(values)
    largest = blocks.abs().argmax(dim=1, keepdim=True)
    scales.copy_(blocks.gather(1, largest).squeeze(1))
    quotients = (blocks / torch.where(scales == 0, 1.0, scales)[:, None]).flatten()[: values.numel()]
    bins = (quotients.view(torch.int32) >> _DROPPED) & (_BINS - 1)
    codes.copy_(_codes(is_signed, values.device).index_select(0, bins).view_as(codes))


def dequantise(codes: Tensor, scales: Tensor, *, is_signed: bool) -> Tensor:
    """The float32 values behind `codes`."""
    values = _table(is_signed, codes.device).index_select(0, codes.flatten().int())
    return (_blocks(values) * scales[:, None]).flatten()[: codes.numel()].view(codes.shape)


def num_blocks(count: int) -> int:
    """Blocks of `count` entries; the last may be short."""
    return -(-count // BLOCK)


def _blocks(values: Tensor) -> Tensor:
    """[blocks, BLOCK], the last filled up with zeros."""
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


@cache
def _table(is_signed: bool, device: torch.device) -> Tensor:
    """The 256 values in ascending order."""
    return torch.tensor(sorted(_values(is_signed)), dtype=torch.float32, device=device)


@cache
def _codes(is_signed: bool, device: torch.device) -> Tensor:
    """The code for each pattern of a number's leading 18 bits: that of the value nearest to the middle of its bin."""
    bits = (torch.arange(_BINS, device=device) << _DROPPED) + (1 << (_DROPPED - 1))
    middles = bits.to(torch.int32).view(torch.float32).nan_to_num().clamp(-1, 1)
    table = _table(is_signed, device)
    return torch.bucketize(middles, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def _values(is_signed: bool) -> list[float]:
    """Each of seven decades holds twice as many values as the one below; in each they lie evenly between 0.1 and 1.

    Signed: 127 positive, 127 negative, 0 and 1. Of squares: 254 positive, 1, and a last one below the smallest decade.
    """
    values = [1.0, 0.0 if is_signed else 10.0 ** -(_MAGNITUDES + 1)]
    for decade in range(_MAGNITUDES):
        count = 2**decade if is_signed else 2 ** (decade + 1)
        middles = [0.1 + 0.9 * (index + 0.5) / count for index in range(count)]
        positive = [middle * 10.0 ** (decade - _MAGNITUDES + 1) for middle in middles]
        values += positive + ([-value for value in positive] if is_signed else [])
    return values
