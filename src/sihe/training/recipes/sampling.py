"""Sampling in this process, without a cache of keys and values: the reference that other rollouts are held against.

    B  sequences      T  time      V  vocabulary

Each token costs a pass over the whole sequence, so this is for short completions. Rows are padded on the right, where
a causal model never looks, and one forward pass serves all that are still going.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sihe.models.decoder import Decoder
from sihe.training.recipes.types import Completion, Sampling


class LocalRollout:
    """Samples from the very weights that are trained; `load` only notes their version."""

    def __init__(self, policy: Decoder, *, end: int) -> None:
        self._policy = policy
        self._end = end
        self._version = 0

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """One completion for each prompt."""
        return sample_completions(self._policy, prompts, sampling, seed=seed, end=self._end, version=self._version)

    def load(self, policy: Decoder, version: int) -> None:
        """Takes `policy` itself, not a copy."""
        self._policy, self._version = policy, version

    def close(self) -> None:
        """Nothing to free."""


@torch.no_grad()
def sample_completions(
    policy: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, end: int, version: int = 0
) -> list[Completion]:
    """One completion for each prompt, until the token `end`, `sampling.max_tokens`, or the model's last position."""
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    room = min(sampling.max_tokens, policy.config.max_positions - int(lengths_B.max()))
    tokens_BT = torch.zeros(len(prompts), int(lengths_B.max()) + room, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
    shares_BT = torch.rand(len(prompts), room, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    going_B = torch.arange(len(prompts))
    for position in range(room):
        at_B = lengths_B[going_B] + position
        x_BTD = policy.hidden(tokens_BT[going_B, : int(at_B.max())])
        logps_BV = torch.log_softmax(policy.logits(x_BTD[torch.arange(len(going_B)), at_B - 1]).float(), -1)
        next_B = _choose(logps_BV, shares_BT[going_B, position], sampling.temperature)
        tokens_BT[going_B, at_B] = next_B
        for row, token, logp in zip(
            going_B.tolist(), next_B.tolist(), logps_BV.gather(1, next_B[:, None])[:, 0].tolist(), strict=True
        ):
            chosen[row].append(token)
            logprobs[row].append(logp)
        going_B = going_B[next_B != end]
        if not len(going_B):
            break
    return [Completion(tuple(ids), tuple(logps), version) for ids, logps in zip(chosen, logprobs, strict=True)]


def _choose(logps_BV: Tensor, shares_B: Tensor, temperature: float) -> Tensor:
    """The token at which the cumulative probability passes each row's share; the likeliest at temperature 0."""
    if temperature == 0:
        return logps_BV.argmax(-1)
    cumulative_BV = torch.softmax(logps_BV.double() / temperature, -1).cumsum(-1)
    found_B = torch.searchsorted(cumulative_BV, shares_B[:, None] * cumulative_BV[:, -1:], right=True)[:, 0]
    return found_B.clamp(max=logps_BV.shape[1] - 1)
