"""What the process of `spec.acceptance` runs: the engine's `verify` on distributions that are known, and timed passes.

K  proposed tokens and the one after      V  vocabulary
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from sihe.apps.coach.errors import LabFailed
from sihe.apps.coach.labs.timing import best_seconds
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.serving.engine.compute.step import Feed, Step
from sihe.serving.engine.kv.blocks import blocks_of
from sihe.serving.engine.kv.storage import KvPages
from sihe.serving.engine.sampler import Draw
from sihe.serving.engine.speculation import Proposal, verify

_VOCABULARY = 32
_CONTEXT = 64
_BATCH_PROPOSALS = 4
_ROUNDS = 3


@torch.no_grad()
def verified(
    rank: int, world_size: int, *, lengths: list[int], trials: int, noise: float, batch: int
) -> dict[str, Any]:
    """Overlap, share kept, tokens of a pass, distances of what came out from p, and seconds of passes."""
    del rank, world_size
    if sys.platform != "linux":
        raise LabFailed("the engine's CPU kernels run on Linux only: run this lab there")
    p_V, q_V, logits_V = distributions(noise)
    found: dict[str, Any] = {"overlap": torch.minimum(p_V, q_V).sum().item(), "tokens": []}
    firsts = torch.zeros(_VOCABULARY)
    kept = proposed = 0
    generator = torch.Generator().manual_seed(11)
    for length in lengths:
        gained = 0
        for trial in range(trials):
            proposal, tokens = _one(logits_V, q_V, length, generator, seed=trial * 16 + length)
            gained += len(tokens)
            # Judged were those that were kept, and the first that was not.
            kept += len(tokens) - 1
            proposed += min(len(tokens), len(proposal))
            firsts[tokens[0]] += 1
        found["tokens"].append(gained / trials)
    found["accepted"] = kept / proposed
    number = int(firsts.sum())
    found["distance"] = _distance(firsts / number, p_V)
    found["fresh_distance"] = _distance(_counted(p_V, number), p_V)
    found["wrong_distance"] = _distance(redrawn_from_p(p_V, q_V), p_V)
    found["pass_s"], found["batch_pass_s"] = _passes([0, *lengths], batch)
    return found


def distributions(noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """p of a model, q of a draft that sees its logits through `noise`, and the model's logits."""
    generator = torch.Generator().manual_seed(3)
    logits_V = 2 * torch.randn(_VOCABULARY, generator=generator)
    seen_V = logits_V + noise * torch.randn(_VOCABULARY, generator=generator)
    return logits_V.softmax(0), seen_V.softmax(0), logits_V


def redrawn_from_p(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The distribution of a token that is drawn from p, not from the rest, after a rejection: what goes wrong."""
    kept_V = torch.minimum(p_V, q_V)
    return kept_V + (1 - kept_V.sum()) * p_V


def _one(
    logits_V: Tensor, q_V: Tensor, length: int, generator: torch.Generator, *, seed: int
) -> tuple[list[int], list[int]]:
    """A proposal that is drawn from q, and the tokens that the engine goes on with."""
    drawn = torch.multinomial(q_V, length, replacement=True, generator=generator).tolist()
    draws = [Draw(temperature=1.0, top_k=0, top_p=1.0, seed=seed, position=place) for place in range(length + 1)]
    proposal = Proposal(tuple(drawn), q_V.expand(length, -1))
    sampled = verify(logits_V.expand(length + 1, -1).contiguous(), draws, proposal)
    return drawn, [item.token for item in sampled]


def _counted(p_V: Tensor, number: int) -> Tensor:
    """As many tokens drawn from p itself: how far chance alone is from p."""
    drawn = torch.multinomial(p_V, number, replacement=True, generator=torch.Generator().manual_seed(5))
    return torch.bincount(drawn, minlength=len(p_V)) / number


def _distance(a_V: Tensor, b_V: Tensor) -> float:
    """Total variation: the largest difference of the probability of any set of tokens."""
    return 0.5 * (a_V - b_V).abs().sum().item()


def _passes(proposed: list[int], batch: int) -> tuple[list[float], list[float]]:
    """Seconds of a pass for one sequence with each number of proposals; of one for `batch`, without and with four."""
    from sihe.serving.engine.compute.cpu.compute import CpuCompute

    torch.manual_seed(0)
    config = ModelConfig(4096, 768, 4, 12, 4, 64, 2048, 2 * _CONTEXT, tie_embeddings=False)
    each = blocks_of(_CONTEXT + max(proposed) + 1)
    pages = KvPages(config, num_blocks=each * batch, dtype=torch.bfloat16)
    compute = CpuCompute(Decoder(config).eval(), pages, "bfloat16", threads=torch.get_num_threads())

    def taken(sequences: int, more: int) -> float:
        tokens = list(range(7, 8 + more))
        feeds = [
            Feed(tokens, _CONTEXT - 1, range(row * each, (row + 1) * each), num_logits=len(tokens))
            for row in range(sequences)
        ]
        step = Step.of(feeds)
        return best_seconds(lambda: compute.forward(step))

    kinds = [(1, more) for more in proposed] + [(batch, more) for more in (0, _BATCH_PROPOSALS)]
    try:
        # In turns, so that a disturbance of the machine does not meet one of them alone.
        rounds = [[taken(*kind) for kind in kinds] for _ in range(_ROUNDS)]
        least = [min(times) for times in zip(*rounds, strict=True)]
        return least[: len(proposed)], least[len(proposed) :]
    finally:
        compute.close()
