"""A step on a CPU: one program over all of its tokens, computed by a team of threads."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.lora import Lora
from sihe.serving.engine.compute.cpu.adapters import AdapterTables
from sihe.serving.engine.compute.cpu.layers import Weights
from sihe.serving.engine.compute.cpu.layout import Sheet
from sihe.serving.engine.compute.cpu.program import Program
from sihe.serving.engine.compute.cpu.support import WeightKind
from sihe.serving.engine.compute.cpu.team import Team, cores, keep_torch_to_one_thread
from sihe.serving.engine.compute.cpu.weights import KINDS
from sihe.serving.engine.compute.step import Step
from sihe.serving.engine.kv.storage import KvPages

_ROWS, _WANTED = 64, 32  # what the first program's buffers hold; they grow with the steps


class CpuCompute:
    """A decoder's weights, packed as `kind`, and the pages of its sequences.

    Takes the weights out of `model`, so that they are not held twice, unless it is to `keep` them.

    What a token computes is independent of the step that it is in: alone, in a batch, in a chunk of a prompt or beside
    tokens that are only proposed, its logits have the same bits.
    """

    def __init__(
        self,
        model: Decoder,
        pages: KvPages,
        kind: WeightKind,
        *,
        head: WeightKind | None = None,
        threads: int | None = None,
        keep: bool = False,
        max_adapters: int = 0,
    ) -> None:
        self._config: ModelConfig = model.config
        self._pages = pages
        self._kinds = (KINDS[kind], KINDS[head or kind])
        self._interleaved = max_adapters == 0
        self._weights = Weights(model, *self._kinds, keep=keep, interleaved=self._interleaved)
        self._adapters = AdapterTables(self._config, self._weights, max_adapters)
        self._team = Team(threads or cores())
        self._program = self._sized(_ROWS, _WANTED)
        self._sheet = self._sheet_of(self._program, _WANTED, 1)
        self._thread: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return self._weights.size_bytes

    def forward(self, step: Step) -> Tensor:
        """One pass over the step's tokens."""
        if threading.get_ident() != self._thread:
            self._thread = threading.get_ident()
            keep_torch_to_one_thread()
        tokens, wanted = len(step.tokens), int(step.logits.sum())
        self._team.settle()  # before what the last step was told is overwritten
        program, sheet = self._fitting(tokens, wanted, *step.tables.shape)
        self._team.run(program.ops, sheet.fill(step))
        return torch.from_numpy(program.logits.data)[:wanted, : self._config.vocab_size]

    def set_adapter(self, number: int, lora: Lora | None) -> None:
        """Where the operations find the adapter's matrices from now on."""
        self._adapters.put(number, lora)

    def refresh(self, model: Decoder) -> None:
        """Packs the weights that `model` has now."""
        self._team.settle()
        self._weights = Weights(model, *self._kinds, keep=True, interleaved=self._interleaved)
        self._program = self._sized(self._program.rows, self._program.wanted)
        self._sheet = self._sheet_of(self._program, self._sheet.feeds, self._sheet.blocks)

    def close(self) -> None:
        """Ends the threads."""
        self._team.close()

    def _sized(self, rows: int, wanted: int) -> Program:
        return Program(self._config, self._weights, self._pages, self._adapters, rows=rows, wanted=wanted)

    def _fitting(self, tokens: int, wanted: int, feeds: int, blocks: int) -> tuple[Program, Sheet]:
        """A program and a sheet for it that are large enough; both grow with the steps."""
        program, sheet = self._program, self._sheet
        if tokens > program.rows or wanted > program.wanted:
            program = self._sized(max(_doubled(tokens), program.rows), max(_doubled(wanted), program.wanted))
        if program is not self._program or feeds > sheet.feeds or blocks > sheet.blocks:
            sheet = self._sheet_of(program, max(_doubled(feeds), sheet.feeds), max(_doubled(blocks), sheet.blocks))
        self._program, self._sheet = program, sheet  # both or, where memory is short, neither
        return program, sheet

    def _sheet_of(self, program: Program, feeds: int, blocks: int) -> Sheet:
        return Sheet(self._config, self._pages, program, feeds=feeds, blocks=blocks)


def _doubled(size: int) -> int:
    return 1 << (size - 1).bit_length()
