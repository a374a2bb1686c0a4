"""A step by torch, on any device and for every decoder: pages are gathered, then attended over.

This is the path of GPUs, the oracle of the kernels in `cpu`, and what serves the architectures that those leave out.
What lies between the attention layers can be compiled (`compiled.py`).

Shapes: T tokens of the step, F feeds, B blocks of the longest feed, N heads, K KV heads, D head dim, V value width,
S tokens in the gathered blocks, C tokens of one feed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sihe.models.attention import Mixing
from sihe.models.decoder import Decoder
from sihe.models.lora import Lora
from sihe.models.places import Places
from sihe.models.ports import Attend
from sihe.models.rope import Rotation
from sihe.models.score_bias import ScoreBias
from sihe.serving.engine.adapters import ADAPTER
from sihe.serving.engine.compute.compiled import CompiledBlocks
from sihe.serving.engine.compute.step import Step
from sihe.serving.engine.kv.blocks import BLOCK_TOKENS
from sihe.serving.engine.kv.storage import KvPages


class TorchCompute:
    """A decoder and the pages of its sequences.

    With `compile`, steps without adapters go through graphs that the first of them make: one for a step of one token,
    one for all others. Such a step raises `ConfigError` where the model cannot be compiled.
    """

    def __init__(self, model: Decoder, pages: KvPages, *, compile: bool = False) -> None:
        self._pages = pages
        self._device = model.embedding.weight.device
        self._lora: Lora | None = None
        self._compile = compile
        self.refresh(model)

    def forward(self, step: Step) -> Tensor:
        """One pass over the step's tokens."""
        model = self._model
        with torch.inference_mode(), self._adapters(step):
            attend = PagedAttention(self._pages, step, model.config.attention.window, self._biases)
            tokens_1T = torch.from_numpy(step.tokens).long()[None].to(self._device)
            positions_1T = torch.from_numpy(step.positions).long()[None].to(self._device)
            x_1TD = model.embed(tokens_1T, positions_1T)
            rotation = None
            if model.config.positions.kind == "rope":
                rotation = model.places.at(positions_1T, x_1TD.dtype, windowed=False).rotation
            run = self._run if self._compiled is None or step.adapters.any() else self._compiled
            x_TD = run(x_1TD, rotation, attend)[0]
            wanted_O = torch.from_numpy(step.wanted).long().to(self._device)
            return model.logits(x_TD[wanted_O]).float()

    def _run(self, x_1TD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """The blocks and the last norm, one operation after the other."""
        places = Places(rotation)
        for block in self._model.blocks:
            x_1TD = block(x_1TD, places, attend)
        return self._model.norm(x_1TD)

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
        self._biases = _biases(model)
        self._compiled = CompiledBlocks(model) if self._compile else None

    def close(self) -> None:
        """Nothing runs between steps."""


class PagedAttention:
    """An `Attend` over pages: writes the step's keys and values, then gathers each feed's blocks. Made for one step.

    Feeds of one token are computed together, padded to the longest; longer ones one by one. `biases` are what each
    layer adds to its scores, of a model that has them.
    """

    def __init__(self, pages: KvPages, step: Step, window: int | None = None, biases: Sequence[ScoreBias] = ()) -> None:
        self.window = window
        self.has_bias = len(biases) > 0
        self._biases = biases
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
        bias = self._biases[layer] if self._biases else None
        for group in self._groups:
            out_TNV[group.rows_FC] = group.attend(q_TND, keys_PKDC, values_PKCV, bias)
        return out_TNV[None]

    def _group(
        self, chosen_F: Tensor, rows_F: Tensor, positions_T: Tensor, tables_FB: Tensor, device: torch.device
    ) -> None:
        rows_F1 = rows_F[chosen_F][:, None]
        self._groups.append(self._one(rows_F1, positions_T, tables_FB[chosen_F], device))

    def _one(self, rows_FC: Tensor, positions_T: Tensor, tables_FB: Tensor, device: torch.device) -> _Group:
        positions_FC = positions_T[rows_FC]
        blocks = int(positions_FC.max()) // BLOCK_TOKENS + 1
        distance_FCS = torch.arange(blocks * BLOCK_TOKENS) - positions_FC[..., None]
        seen_FCS = distance_FCS <= 0
        if self.window is not None:
            seen_FCS &= distance_FCS > -self.window
        distances = distance_FCS.to(device) if self.has_bias else None
        return _Group(rows_FC.to(device), tables_FB[:, :blocks].to(device), seen_FCS.to(device), distances)


class _Group:
    """Feeds of the same number of tokens; their distances are key position less query position."""

    def __init__(self, rows_FC: Tensor, tables_FB: Tensor, seen_FCS: Tensor, distance_FCS: Tensor | None) -> None:
        self.rows_FC = rows_FC
        self._tables_FB = tables_FB
        self._seen_F1CS = seen_FCS[:, None]
        self._distance_FCS = distance_FCS

    def attend(self, q_TND: Tensor, keys_PKDC: Tensor, values_PKCV: Tensor, bias: ScoreBias | None) -> Tensor:
        """The mixed values of the group's tokens, [F, C, N, V]."""
        k_FKSD = keys_PKDC[self._tables_FB].permute(0, 2, 1, 4, 3).flatten(2, 3)
        v_FKSV = values_PKCV[self._tables_FB].transpose(1, 2).flatten(2, 3)
        q_FNCD = q_TND[self.rows_FC].transpose(1, 2)
        mixed_FNCV = scaled_dot_product_attention(
            q_FNCD,
            k_FKSD.to(q_FNCD.dtype),
            v_FKSV.to(q_FNCD.dtype),
            attn_mask=self._mask(bias, q_FNCD.dtype),
            enable_gqa=q_FNCD.shape[1] != k_FKSD.shape[1],
        )
        return mixed_FNCV.transpose(1, 2)

    def _mask(self, bias: ScoreBias | None, dtype: torch.dtype) -> Tensor:
        """Which keys are seen, [F, 1, C, S], or what is added to their scores, [F, N, C, S]."""
        if bias is None or self._distance_FCS is None:
            return self._seen_F1CS
        feeds, tokens, places = self._distance_FCS.shape
        bias_NTS = bias(self._distance_FCS.flatten(0, 1), dtype)
        bias_FNCS = bias_NTS.view(-1, feeds, tokens, places).transpose(0, 1)
        return torch.where(self._seen_F1CS, bias_FNCS, -torch.inf)


def _biases(model: Decoder) -> list[ScoreBias]:
    """What each layer adds to its scores; none for a model that tells places apart otherwise."""
    mixings = [module for module in model.modules() if isinstance(module, Mixing)]
    return [mixing.bias for mixing in sorted(mixings, key=lambda mixing: mixing.layer) if mixing.bias is not None]
