"""Where the tokens of a pass stand and which of them see each other, as all layers of a model need it.

    B  batch      T  time      S  time, of the keys      D  hidden      H  head dim

A document is a run of equal numbers in `documents_BT`: attention stays inside it, and its positions begin at 0. Padding
is a document of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sihe.models.config import ModelConfig
from sihe.models.rope import RotaryTable, Rotation, check_length


@dataclass(frozen=True)
class Places:
    """What one pass tells its attention layers."""

    rotation: Rotation | None = None
    """Of queries and keys; None for a model without rotary positions."""
    mask: Tensor | None = None
    """True where a query (T) sees a key (S), [B or 1, T, S]; None for plain causal or plain mutual attention."""
    distance: Tensor | None = None
    """Key position less query position, [T, S], for biases on scores; None for a model without."""


class PlaceTable:
    """Makes the `Places` of a model's passes; angles are computed once a device. Not a module: it has no weights."""

    def __init__(self, config: ModelConfig) -> None:
        self._max_positions = config.max_positions
        self._causal = config.attention.causal
        self._window = config.attention.window
        self._has_bias = config.positions.kind in ("relative", "alibi")
        self._rotary: RotaryTable | None = None
        if config.positions.kind == "rope":
            latent = config.attention.latent
            width = config.head_dim if latent is None else latent.rotary_dim
            self._rotary = RotaryTable(width, config.max_positions, config.rope_theta, config.positions.scaling)

    def prefix(
        self,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        documents_BT: Tensor | None = None,
        *,
        windowed: bool = True,
    ) -> Places:
        """Positions 0 .. length - 1, or those in the documents. Raises `TooLarge` for a longer sequence than may be.

        Without `windowed` the model's window is left to whoever attends.
        """
        check_length(length, self._max_positions)
        if documents_BT is not None:
            return self.at(positions_in(documents_BT), dtype, documents_BT, windowed=windowed)
        rotation = None if self._rotary is None else self._rotary.prefix(length, device, dtype)
        return Places(rotation, *self._sight(length, device, None, windowed=windowed))

    def at(
        self, positions_BT: Tensor, dtype: torch.dtype, documents_BT: Tensor | None = None, *, windowed: bool = True
    ) -> Places:
        """Given positions; who sees whom goes by the order of the tokens all the same."""
        rotation = None if self._rotary is None else self._rotary.at(positions_BT, dtype)
        sight = self._sight(positions_BT.shape[1], positions_BT.device, documents_BT, windowed=windowed)
        return Places(rotation, *sight)

    def _sight(
        self, length: int, device: torch.device, documents_BT: Tensor | None, *, windowed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Mask and distances, where the kernel's own causal mask does not do."""
        window = self._window if windowed else None
        if window is None and documents_BT is None and not self._has_bias:
            return None, None
        place = torch.arange(length, device=device)
        distance_TS = place - place[:, None]
        mask_BTS = (distance_TS <= 0 if self._causal else torch.ones_like(distance_TS, dtype=torch.bool))[None]
        if window is not None:
            mask_BTS = mask_BTS & (distance_TS.abs() < window)
        if documents_BT is not None:
            run_BT = _starts(documents_BT).cumsum(1)
            mask_BTS = mask_BTS & (run_BT[:, :, None] == run_BT[:, None])
        return mask_BTS, distance_TS if self._has_bias else None


def positions_in(documents_BT: Tensor) -> Tensor:
    """The place of each token in its document: 0, 1, 2 … anew wherever the number changes, [B, T]."""
    place_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    return place_T - (place_T * _starts(documents_BT)).cummax(1).values


def _starts(documents_BT: Tensor) -> Tensor:
    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return starts_BT


def sinusoids(max_positions: int, width: int, device: torch.device) -> Tensor:
    """A fixed vector for each place, sines in even dims and cosines in odd ones, float32 [P, D].

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5.
    """
    pair = torch.arange(0, width, 2, dtype=torch.float64, device=device)
    angle = torch.arange(max_positions, device=device).double()[:, None] * 10000.0 ** -(pair / width)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width].float()
