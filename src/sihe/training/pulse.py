"""A rank's heartbeat from inside its forward pass, and how long that pass takes without waiting for other ranks.

The clock runs inside the blocks of the model only. Gradients are summed, and sharded weights are gathered, outside of
them; so a slow rank is told from those that wait for it. Ranks that share out a block (tensor, context and expert
parallelism) wait for each other inside, and are slow together. On an accelerator the time is that of launching.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from torch import nn

from sihe.cluster.heartbeats import Heartbeat


class Pulse:
    """Beats in `heartbeat` at each block of each micro-batch, and adds up the time inside.

    Made after whatever else hooks into `blocks`, so that its clock starts last.
    """

    def __init__(self, blocks: Iterable[nn.Module], heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        self._entered_s = 0.0
        self._inside_s = 0.0
        for block in blocks:
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave)

    def begin(self, step: int) -> None:
        """Step `step` (from 1) begins."""
        self._inside_s = 0.0
        self.heartbeat.beat(step)

    def end(self, step: int) -> None:
        """Step `step` is done."""
        self.heartbeat.computed(step, self._inside_s)
        self.heartbeat.beat()

    def _enter(self, *_: object) -> None:
        self.heartbeat.beat()
        self._entered_s = time.perf_counter()

    def _leave(self, *_: object) -> None:
        self._inside_s += time.perf_counter() - self._entered_s
