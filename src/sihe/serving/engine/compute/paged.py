"""A step by torch, on any device and for every decoder: pages are gathered, then attended over.

This is the path of GPUs, the oracle of the kernels in `cpu`, and what serves the architectures that those leave out.

Shapes: T tokens of the step, F feeds, B blocks of the longest feed, N heads, K KV heads, D head dim, V value width,
S tokens in the gathered blocks, C tokens of one feed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sihe.models.decoder import Decoder
from sihe.models.lora import Lora
from sihe.serving.engine.adapters import ADAPTER
from sihe.serving.engine.compute.step import Step
from sihe.serving.engine.kv.blocks import BLOCK_TOKENS
from sihe.serving.engine.kv.storage import KvPages


class TorchCompute:
    """A decoder and the pages of its sequences."""

    def __init__(self, model: Decoder, pages: KvPages) -> None:
        self._model = model
        self._pages = pages
        self._device = model.embedding.weight.device
        self._lora: Lora | None = None

    def forward(self, step: Step) -> Tensor:
        """One pass over the step's tokens."""
        with torch.inference_mode(), self._adapters(step):
            attend = PagedAttention(self._pages, step, self._model.config.attention.window)
            tokens_1T = torch.from_numpy(step.tokens).long()[None].to(self._device)
            positions_1T = torch.from_numpy(step.positions).long()[None].to(self._device)
            x_TD = self._model.hidden(tokens_1T, positions_1T, attend)[0]
            wanted_O = torch.from_numpy(step.wanted).long().to(self._device)
            return self._model.logits(x_TD[wanted_O]).float()

    def _adapters(self, step: Step) -> AbstractContextManager[None]:
        if self._lora is None or not step.adapters.any():
            return nullcontext()
        place = {0: -1} | {int(name): index for index, name in enumerate(self._lora.names)}
        chosen_T = [place.get(number, -1) for number in step.adapters[step.feed].tolist()]
        return self._lora.by_row(torch.tensor([chosen_T], device=self._device))

    def set_adapter(self, number: int, lora: Lora | None) -> None:
        """Puts the adapter's matrices onto the model, or takes them away."""
        if self._lora is None:
            self._lora = Lora(self._model)
        name = str(number)
        if name in self._lora.names:
            self._lora.remove(name)
        if lora is None:
            return
        self._lora.add(name, lora.config(ADAPTER))
        with torch.no_grad():
            for (_, *ours), (_, *theirs) in zip(self._lora.matrices(name), lora.matrices(ADAPTER), strict=True):
                for mine, given in zip(ours, theirs, strict=True):
                    mine.copy_(given)

    def refresh(self, model: Decoder) -> None:
        """Computes with `model` from now on."""
        self._model = model

    def close(self) -> None:
        """Nothing runs between steps."""


class PagedAttention:
    """An `Attend` over pages: writes the step's keys and values, then gathers each feed's blocks. Made for one step.

    Feeds of one token are computed together, padded to the longest; longer ones one by one.
    """

    def __init__(self, pages: KvPages, step: Step, window: int | None = None) -> None:
        self.window = window
        self._pages = pages
        device = pages.keys.device
        tables_FB = torch.from_numpy(step.tables).long()
        feed_T, positions_T = torch.from_numpy(step.feed).long(), torch.from_numpy(step.positions).long()
        self._block_T = tables_FB[feed_T, positions_T // BLOCK_TOKENS].to(device)
        self._place_T = (positions_T % BLOCK_TOKENS).to(device)
        self._groups: list[_Group] = []
        ends_F = torch.from_numpy(step.lengths).long().cumsum(0)
        single_F = torch.from_numpy(step.lengths) == 1
        if single_F.any():
            self._group(single_F, ends_F - 1, positions_T, tables_FB, device)
        for feed in (~single_F).nonzero()[:, 0].tolist():
            rows_T = torch.arange(int(ends_F[feed]) - int(step.lengths[feed]), int(ends_F[feed]))
            self._groups.append(self._one(rows_T[None], positions_T, tables_FB[feed : feed + 1], device))

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """The attention output of one layer for every token of the step."""
        keys_PKDC = self._pages.keys[layer]
        values_PKCV = self._pages.values[layer, ..., : self._pages.value_dim]
        dtype = keys_PKDC.dtype
        keys_PKDC[self._block_T, :, :, self._place_T] = k_BTKH[0].to(dtype)
        values_PKCV[self._block_T, :, self._place_T] = v_BTKH[0].to(dtype)
        q_TND = q_BTNH[0]
        out_TNV = q_TND.new_empty((*q_TND.shape[:2], values_PKCV.shape[-1]))
        for group in self._groups:
            out_TNV[group.rows_FC] = group.attend(q_TND, keys_PKDC, values_PKCV)
        return out_TNV[None]

    def _group(
        self, chosen_F: Tensor, rows_F: Tensor, positions_T: Tensor, tables_FB: Tensor, device: torch.device
    ) -> None:
        rows_F1 = rows_F[chosen_F][:, None]
        self._groups.append(self._one(rows_F1, positions_T, tables_FB[chosen_F], device))

    def _one(self, rows_FC: Tensor, positions_T: Tensor, tables_FB: Tensor, device: torch.device) -> _Group:
        positions_FC = positions_T[rows_FC]
        blocks = int(positions_FC.max()) // BLOCK_TOKENS + 1
        place_S = torch.arange(blocks * BLOCK_TOKENS)
        seen_FCS = place_S <= positions_FC[..., None]
        if self.window is not None:
            seen_FCS &= place_S > positions_FC[..., None] - self.window
        return _Group(rows_FC.to(device), tables_FB[:, :blocks].to(device), seen_FCS.to(device))


class _Group:
    """Feeds of the same number of tokens."""

    def __init__(self, rows_FC: Tensor, tables_FB: Tensor, seen_FCS: Tensor) -> None:
        self.rows_FC = rows_FC
        self._tables_FB = tables_FB
        self._seen_F1CS = seen_FCS[:, None]

    def attend(self, q_TND: Tensor, keys_PKDC: Tensor, values_PKCV: Tensor) -> Tensor:
        """The mixed values of the group's tokens, [F, C, N, V]."""
        k_FKSD = keys_PKDC[self._tables_FB].permute(0, 2, 1, 4, 3).flatten(2, 3)
        v_FKSV = values_PKCV[self._tables_FB].transpose(1, 2).flatten(2, 3)
        q_FNCD = q_TND[self.rows_FC].transpose(1, 2)
        mixed_FNCV = scaled_dot_product_attention(
            q_FNCD,
            k_FKSD.to(q_FNCD.dtype),
            v_FKSV.to(q_FNCD.dtype),
            attn_mask=self._seen_F1CS,
            enable_gqa=q_FNCD.shape[1] != k_FKSD.shape[1],
        )
        return mixed_FNCV.transpose(1, 2)
