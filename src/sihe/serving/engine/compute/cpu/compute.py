"""A step on a CPU: one program over all of its tokens, computed by a team of threads."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sihe.core.errors import InternalError
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.lora import Lora
from sihe.serving.engine.compute.cpu.adapters import AdapterTables
from sihe.serving.engine.compute.cpu.kernels import ATTEND_ROWS, STEP_WIDTH, TILE_PAGES
from sihe.serving.engine.compute.cpu.program import Program, Weights
from sihe.serving.engine.compute.cpu.support import WeightKind
from sihe.serving.engine.compute.cpu.team import Team, cores
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
        self._weights = Weights(model, *self._kinds, keep=keep)
        self._adapters = AdapterTables(self._config, self._weights, max_adapters)
        self._team = Team(threads or cores())
        self._program = self._sized(_ROWS, _WANTED)
        self._group = self._config.num_heads // self._config.num_kv_heads

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return self._weights.size_bytes

    def forward(self, step: Step) -> Tensor:
        """One pass over the step's tokens."""
        self._check(step)
        tokens, wanted = len(step.tokens), len(step.wanted)
        program = self._program
        if tokens > program.rows or wanted > program.wanted:
            rows, most = max(_doubled(tokens), program.rows), max(_doubled(wanted), program.wanted)
            program = self._program = self._sized(rows, most)
        program.last_rows[:wanted] = step.wanted
        given, _kept = self._numbers(step, program)
        self._team.run(program.ops, given)
        return torch.from_numpy(program.logits.data)[:wanted, : self._config.vocab_size]

    def set_adapter(self, number: int, lora: Lora | None) -> None:
        """Where the operations find the adapter's matrices from now on."""
        self._adapters.put(number, lora)

    def refresh(self, model: Decoder) -> None:
        """Packs the weights that `model` has now."""
        self._weights = Weights(model, *self._kinds, keep=True)
        self._program = self._sized(self._program.rows, self._program.wanted)

    def close(self) -> None:
        """Ends the threads."""
        self._team.close()

    def _sized(self, rows: int, wanted: int) -> Program:
        return Program(self._config, self._weights, self._pages, self._adapters, rows=rows, wanted=wanted)

    def _numbers(self, step: Step, program: Program) -> tuple[NDArray[np.int64], list[NDArray[np.generic]]]:
        """What the operations are told of the step, and the arrays that it points at."""
        pages = self._pages
        feeds, blocks = step.tables.shape
        tables = np.zeros((feeds, -(-blocks // TILE_PAGES) * TILE_PAGES), np.int64)
        tables[:, :blocks] = step.tables
        key_pages = tables * pages.keys[0, 0].nbytes
        value_pages = tables * pages.values[0, 0].nbytes
        tasks = _tasks(step.lengths * self._group)
        firsts = (np.cumsum(step.lengths) - step.lengths).astype(np.int32)
        kept: list[NDArray[np.generic]] = [key_pages, value_pages, tasks, firsts]
        given = np.empty(STEP_WIDTH, np.int64)
        given[:] = (
            len(step.tokens), len(step.wanted), feeds, step.tokens.ctypes.data, step.positions.ctypes.data,
            step.feed.ctypes.data, step.starts.ctypes.data, step.lengths.ctypes.data, key_pages.ctypes.data,
            value_pages.ctypes.data, tables.shape[1], len(tasks), tasks.ctypes.data, step.adapters.ctypes.data,
            firsts.ctypes.data, len(step.tokens) * program.choices,
        )  # fmt: skip
        return given, kept

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
        )
        if not is_inside:
            raise InternalError("a step names a token, position or block that is not there")


def _tasks(rows_F: NDArray[np.int32]) -> NDArray[np.int32]:
    """[n, 3]: feed, first row, rows, of pieces of at most `ATTEND_ROWS` rows."""
    pieces_F = -(-rows_F // ATTEND_ROWS)
    feed = np.repeat(np.arange(len(rows_F), dtype=np.int32), pieces_F)
    place = np.arange(len(feed), dtype=np.int32) - np.repeat(np.cumsum(pieces_F) - pieces_F, pieces_F)
    first = place * ATTEND_ROWS
    return np.stack((feed, first, np.minimum(rows_F[feed] - first, ATTEND_ROWS)), axis=1).astype(np.int32)


def _doubled(size: int) -> int:
    return 1 << (size - 1).bit_length()
