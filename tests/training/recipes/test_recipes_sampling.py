"""Sampling: the distribution is the model's, the log-probabilities are those of the tokens, and rows do not mix."""

from __future__ import annotations

import pytest
import torch

from sihe.core.errors import InvalidInput
from sihe.models.decoder import Decoder
from sihe.training.recipes.logprobs import next_token_logprobs
from sihe.training.recipes.sampling import LocalRollout, sample_completions
from sihe.training.recipes.sequences import joined
from sihe.training.recipes.types import Sampling
from support.tiny_models import tiny_config

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]


@pytest.fixture(scope="module")
def policy() -> Decoder:
    torch.manual_seed(0)
    return Decoder(tiny_config()).requires_grad_(False)


def test_log_probabilities_are_those_that_training_computes(policy: Decoder) -> None:
    completions = sample_completions(policy, PROMPTS, Sampling(6), seed=1, end=1)
    batch = joined(PROMPTS, [completion.token_ids for completion in completions])
    logps_BT = next_token_logprobs(policy, batch.tokens)
    for row, completion in enumerate(completions):
        ours = torch.tensor(completion.logprobs)
        torch.testing.assert_close(logps_BT[row, batch.target_mask[row].bool()], ours)


def test_a_row_is_the_same_alone_and_among_others_when_greedy(policy: Decoder) -> None:
    together = sample_completions(policy, PROMPTS, Sampling(6, temperature=0), seed=1, end=1)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        (alone,) = sample_completions(policy, [prompt], Sampling(6, temperature=0), seed=9, end=1)
        assert alone.token_ids == completion.token_ids
        tokens = torch.tensor([[*prompt, *completion.token_ids]])
        assert policy(tokens)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == list(completion.token_ids)


def test_the_same_seed_draws_the_same(policy: Decoder) -> None:
    first, second, other = (sample_completions(policy, PROMPTS, Sampling(6), seed=seed, end=1) for seed in (3, 3, 4))
    assert first == second
    assert first != other


def test_frequencies_are_the_models_probabilities() -> None:
    torch.manual_seed(0)
    model = Decoder(tiny_config()).requires_grad_(False)
    probabilities_V = torch.softmax(model(torch.tensor([[5]]))[0, -1].double() * 3, -1)  # temperature 1/3
    drawn = sample_completions(model, [[5]] * 20_000, Sampling(1, temperature=1 / 3), seed=0, end=1)
    counts_V = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=320).double()
    # Pearson's statistic has mean 319 and deviation 25: five deviations
    statistic = float(((counts_V - 20_000 * probabilities_V) ** 2 / (20_000 * probabilities_V)).sum())
    assert 319 - 5 * 25 < statistic < 319 + 5 * 25


def test_the_end_token_ends_a_row_and_counts(policy: Decoder) -> None:
    (free,) = sample_completions(policy, [[5, 6]], Sampling(6, temperature=0), seed=0, end=-1)
    end = free.token_ids[2]
    (cut,) = sample_completions(policy, [[5, 6]], Sampling(6, temperature=0), seed=0, end=end)
    assert cut.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert len(free.token_ids) == 6


def test_the_last_position_of_the_model_is_not_passed(policy: Decoder) -> None:
    long = list(range(2, 127))
    (completion,) = sample_completions(policy, [long], Sampling(50), seed=0, end=-1)
    assert len(completion.token_ids) == policy.config.max_positions - len(long)


def test_a_rollout_says_by_which_weights(policy: Decoder) -> None:
    rollout = LocalRollout(policy, end=1)
    assert rollout.sample(PROMPTS, Sampling(2), seed=0)[0].version == 0
    rollout.load(policy, 7)
    assert {completion.version for completion in rollout.sample(PROMPTS, Sampling(2), seed=0)} == {7}
    rollout.close()


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"max_tokens": 1, "temperature": -1.0}])
def test_sampling_checks_itself(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput):
        Sampling(**wrong)  # type: ignore[arg-type]
