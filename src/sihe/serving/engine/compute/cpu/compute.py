"""A step on a CPU: one program over all of its tokens, computed by a team of threads."""

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sihe.core.errors import InternalError
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.lora import Lora
from sihe.serving.engine.compute.cpu.adapters import AdapterTables
from sihe.serving.engine.compute.cpu.attention import ATTEND_ROWS, TILE_PAGES
from sihe.serving.engine.compute.cpu.layers import Weights
from sihe.serving.engine.compute.cpu.layout import lay_out
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
        self._thread: int | None = None
        self._kept: tuple[object, ...] = ()
        self._group = self._config.num_heads // self._config.num_kv_heads

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return self._weights.size_bytes

    def forward(self, step: Step) -> Tensor:
        """One pass over the step's tokens."""
        self._check(step)
        if threading.get_ident() != self._thread:
            self._thread = threading.get_ident()
            keep_torch_to_one_thread()
        tokens, wanted = len(step.tokens), int(step.logits.sum())
        program = self._program
        if tokens > program.rows or wanted > program.wanted:
            rows, most = max(_doubled(tokens), program.rows), max(_doubled(wanted), program.wanted)
            program = self._program = self._sized(rows, most)
        self._team.run(program.ops, self._laid_out(step, program, tokens, wanted))
        return torch.from_numpy(program.logits.data)[:wanted, : self._config.vocab_size]

    def set_adapter(self, number: int, lora: Lora | None) -> None:
        """Where the operations find the adapter's matrices from now on."""
        self._adapters.put(number, lora)

    def refresh(self, model: Decoder) -> None:
        """Packs the weights that `model` has now."""
        self._weights = Weights(model, *self._kinds, keep=True, interleaved=self._interleaved)
        self._program = self._sized(self._program.rows, self._program.wanted)

    def close(self) -> None:
        """Ends the threads."""
        self._team.close()

    def _sized(self, rows: int, wanted: int) -> Program:
        return Program(self._config, self._weights, self._pages, self._adapters, rows=rows, wanted=wanted)

    def _laid_out(self, step: Step, program: Program, tokens: int, wanted: int) -> NDArray[np.int64]:
        """What the operations are told of the step."""
        pages, feeds = self._pages, len(step.lengths)
        width = -(-step.tables.shape[1] // TILE_PAGES) * TILE_PAGES
        rows = np.empty((2, tokens), np.int32)
        page_offsets = np.zeros((2, feeds, width), np.int64)
        firsts = np.empty((2, feeds), np.int32)
        tasks = np.empty((2, tokens * self._group // ATTEND_ROWS + feeds, 3), np.int32)
        counts = np.empty(2, np.int64)
        lay_out(
            step.starts, step.lengths, step.logits, step.tables, self._group, ATTEND_ROWS,
            pages.keys[0, 0].nbytes, pages.values[0, 0].nbytes, rows, page_offsets, firsts, tasks, counts,
            program.wanted_rows,
        )  # fmt: skip
        given = np.array(
            (
                tokens, wanted, feeds, step.tokens.ctypes.data, rows[0].ctypes.data, rows[1].ctypes.data,
                step.starts.ctypes.data, step.lengths.ctypes.data, page_offsets[0].ctypes.data,
                page_offsets[1].ctypes.data, width, *counts, tasks[0].ctypes.data, tasks[1].ctypes.data,
                firsts[0].ctypes.data, firsts[1].ctypes.data, step.adapters.ctypes.data,
                program.wanted_rows[1].ctypes.data, program.choices,
            ),
            np.int64,
        )  # fmt: skip
        self._kept = (step, rows, page_offsets, firsts, tasks)  # what `given` points at
        return given

    def _check(self, step: Step) -> None:
        """The operations read wherever these numbers say: none may point outside."""
        last = step.starts + step.lengths - 1
        is_inside = (
            step.tokens.min() >= 0
            and step.tokens.max() < self._config.vocab_size
            and step.starts.min() >= 0
            and last.max() < self._config.max_positions
            and (last // 16).max() < step.tables.shape[1]
            and step.tables.min() >= 0
            and step.tables.max() < self._pages.num_blocks
            and step.logits.min() >= 0
            and (step.logits <= step.lengths).all()
        )
        if not is_inside:
            raise InternalError("a step names a token, position or block that is not there")


def _doubled(size: int) -> int:
    return 1 << (size - 1).bit_length()
