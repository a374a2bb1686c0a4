"""The serving engine as what a recipe samples with: training and serving meet here, where both may be known.

Weights are copied into the engine's own model while nothing runs. A gate keeps new samples out meanwhile, and the
engine is known to be idle when those that passed it have ended.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from sihe.core.clock import Clock
from sihe.core.errors import Busy
from sihe.models.decoder import Decoder
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.runner import ModelRunner
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.tokenizer import ModelTokenizer
from sihe.serving.engine.types import Generation, GenerationRequest
from sihe.serving.errors import EngineDead
from sihe.training.recipes.config import GrpoStage
from sihe.training.recipes.errors import WeightSyncFailed
from sihe.training.recipes.types import Completion, Sampling
from sihe.training.recipes.weight_sync import Sync, Timeouts, WeightSync

_BATCH = 64  # sequences that decode together
_WAITING = 1 << 16  # a round of rollouts is handed over at once
_POLL_S = 0.002  # how often a pause looks whether the engine is idle
_SEEDS = (1 << 63) - 1


class EngineRollout:
    """Samples from the model in `model_folder` with an engine of its own, at version 0 until `load`."""

    def __init__(self, model_folder: Path, timeouts: Timeouts | None = None, *, clock: Clock | None = None) -> None:
        # float32, as the policy is trained: the log-probabilities must be those by which the tokens were drawn
        config = EngineConfig(dtype="float32", max_batch_size=_BATCH, max_waiting=_WAITING)
        self._runner = ModelRunner.load(model_folder, config, keep_model=True)
        self._timeouts = timeouts or Timeouts()
        self._engine = Engine(self._runner, ModelTokenizer.load(model_folder), config, name="rollout")
        self._transfers = WeightSync(self, self._timeouts, clock=clock)
        self._wanted = 0
        self._changed = threading.Condition()
        self._is_open = True
        self._sampling = 0

    @property
    def sync(self) -> Sync:
        """Where the transfer of weights is."""
        return self._transfers.sync

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """One completion for each prompt. Raises `WeightSyncFailed` while the engine has no whole set of weights, and
        `Busy` when it says nothing for as long as a pause may last."""
        self._enter()
        streams: list[GenerationStream] = []
        try:
            version = self.sync.version
            for row, prompt in enumerate(prompts):
                request = GenerationRequest(
                    prompt=tuple(prompt),
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    seed=((seed << 20) + row) & _SEEDS,
                    logprobs=0,
                )
                streams.append(self._engine.submit(request))
            answers = [stream.result(self._timeouts.pause_s) for stream in streams]
        finally:
            for stream in streams:
                stream.close()  # after an error nobody reads the others
            self._leave()
        return [Completion(answer.token_ids, _logprobs(answer), version) for answer in answers]

    def load(self, policy: Decoder, version: int) -> None:
        """Brings the weights of `policy` to the engine. Raises `WeightSyncFailed`; the next call tries again.

        When already the pause fails, the engine goes on with the weights that it has.
        """
        if version == self.sync.version and self.sync.is_intact:
            return
        if self.sync.failed_in is not None:
            self._transfers.reset()
        self._wanted = version
        try:
            self._transfers.send(policy, version)
        except WeightSyncFailed:
            if self.sync.is_intact:
                self.resume()
            raise

    def close(self) -> None:
        """Ends the engine and frees its model."""
        self._transfers.close()
        self._engine.close(drain=False)

    # ---- what a transfer asks for -----------------------------------------------------------------------------------

    def pause(self) -> None:
        """Lets no new samples in, and returns when the engine is idle. Raises `EngineDead`."""
        with self._changed:
            self._is_open = False
            while self._sampling or self._engine.num_sequences:
                if not self._engine.is_alive:
                    raise EngineDead("the engine has stopped: its rollouts end here")
                self._changed.wait(_POLL_S)
        if not self._engine.is_alive:
            raise EngineDead("the engine has stopped: it takes no weights")

    @torch.no_grad()
    def transfer(self, policy: Decoder, version: int) -> None:
        """Copies the weights, tensor by tensor. Raises `Busy` when a newer transfer has begun meanwhile."""
        weights = dict(policy.named_parameters())
        for name, target in self._runner.model.named_parameters():
            if self._wanted != version:
                raise Busy(f"the transfer of weights {version} was overtaken by {self._wanted}")
            target.copy_(weights[name])
        self._runner.refresh()
        self._engine.forget_prefixes()  # keys and values of the old weights

    def resume(self) -> None:
        """Lets samples in again."""
        with self._changed:
            self._is_open = True

    def _enter(self) -> None:
        with self._changed:
            if not (self._is_open and self.sync.is_intact):
                raise WeightSyncFailed(self.sync.state.value, self._wanted, self.sync.reason or "a transfer runs")
            self._sampling += 1

    def _leave(self) -> None:
        with self._changed:
            self._sampling -= 1
            self._changed.notify_all()


def _logprobs(answer: Generation) -> tuple[float, ...]:
    return tuple(item.logprob for item in answer.logprobs if item.logprob is not None)  # None: an echoed prompt's first


def open_engine_rollout(stage: GrpoStage, model_folder: Path) -> EngineRollout:
    """The engine that a GRPO stage asks for."""
    limit_s = stage.sync_timeout_s
    return EngineRollout(model_folder, Timeouts(pause_s=limit_s, transfer_s=limit_s, resume_s=limit_s))
