"""One optimizer step over a global batch: micro-batches, gradient accumulation, the update.

The loss is the mean over the target tokens of the *global* batch, whatever the plan of parallelism and the number of
micro-batches, and however the targets that are left out (-1) are spread over them.

Shapes: B samples of this rank, T positions.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sihe.data.loading.samples import Batch

if TYPE_CHECKING:
    from sihe.training.loss_scale import LossScale
    from sihe.training.parallel.apply import ParallelModel
    from sihe.training.ports import Optimizer, Schedule
    from sihe.training.ranks import Ranks

_DIGEST_BITS = 48  # so that the sum over 2^15 ranks still fits an int64


@dataclass(frozen=True)
class StepOutcome:
    """What one step computed; the same on every rank."""

    loss: float
    lr: float
    grad_norm: float
    tokens: int
    samples: str


class TrainStep:
    """Forward, backward, sum over ranks, update; with a `loss_scale`, again where the gradients overflow."""

    def __init__(
        self,
        model: ParallelModel,
        optimizer: Optimizer,
        schedule: Schedule,
        ranks: Ranks,
        *,
        micro_batch: int,
        loss_scale: LossScale | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._schedule = schedule
        self._ranks = ranks
        self._loss_scale = loss_scale
        self._samples_at_once = micro_batch * model.plan.microbatches

    def __call__(self, step: int, batch: np.ndarray | Batch) -> StepOutcome:
        """Trains on this rank's `batch` (tokens int64 [B, T + 1]: inputs, and shifted by one their targets)."""
        lr = self._schedule.at(step)
        while True:
            loss, tokens, samples = self.accumulate(batch)
            with self._ranks.errors():
                norm = self._optimizer.step(lr)
            if math.isfinite(norm) and self._loss_scale is not None:
                self._loss_scale.fitted()
            overflowed = self._loss_scale is not None and math.isfinite(loss) and not math.isfinite(norm)
            if not (overflowed and self._loss_scale is not None and self._loss_scale.overflowed()):
                break
        if math.isfinite(norm):
            with self._ranks.errors():
                self._model.balance()
        return StepOutcome(loss, lr, norm, tokens, samples)

    def accumulate(self, batch: np.ndarray | Batch) -> tuple[float, int, str]:
        """Leaves the gradients of the global batch in `.grad`; its loss, target tokens and sample digest.

        A token of -1 is no target, and read as token 0 where it is an input (padding at the end of a sample).
        """
        batch = Batch(batch) if isinstance(batch, np.ndarray) else batch
        inputs_BT, targets_BT = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
        documents_BT = None if batch.input_documents is None else torch.from_numpy(batch.input_documents)
        digest = samples_digest(batch.tokens, first=self._model.batch_rank * len(batch))
        targets = int((targets_BT >= 0).sum())
        counts = self._ranks.sum_(torch.tensor([targets, digest] if self._model.speaks else [0, 0]))
        total = max(int(counts[0]), 1)
        # Only a power of two is exact in bfloat16, the format of the backward pass; the rest is applied in float32.
        scale = 2.0 ** -math.ceil(math.log2(total)) * (self._loss_scale.factor if self._loss_scale else 1.0)
        loss = torch.zeros((), dtype=torch.float64)
        with self._ranks.errors():
            self._model.zero_grad()
            for start in range(0, len(batch), self._samples_at_once):
                part = slice(start, start + self._samples_at_once)
                loss += self._model.backward(
                    inputs_BT[part],
                    targets_BT[part],
                    scale,
                    is_last=part.stop >= len(batch),
                    documents_BT=None if documents_BT is None else documents_BT[part],
                )
            self._model.finish_gradients(1 / (scale * total))
        return float(self._ranks.sum_(loss)) / total, total, f"{int(counts[1]) % (1 << _DIGEST_BITS):012x}"


def samples_digest(batch: np.ndarray, *, first: int) -> int:
    """A number for the samples of `batch`, the first of which has position `first` in the global batch.

    The sum of the parts' numbers, modulo 2^48, is the number of the whole: it does not depend on how a global batch is
    shared out, but on each token and on the order.
    """
    total = 0
    for position, sample in enumerate(np.ascontiguousarray(batch), start=first):
        key = position.to_bytes(8, "little")
        total += int.from_bytes(hashlib.blake2b(sample, digest_size=_DIGEST_BITS // 8, key=key).digest(), "little")
    return total % (1 << _DIGEST_BITS)
