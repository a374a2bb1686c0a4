"""Sampling: against exact distributions, and the promise that a seed decides alone."""

from __future__ import annotations

import math
import random

import pytest
import torch

from sihe.serving.engine.sampler import Draw, sample, uniform

VOCABULARY = 40
# Upper 0.1 % points of the chi-square distribution by degrees of freedom (Abramowitz & Stegun, table 26.8).
CHI_SQUARE_999 = {3: 16.27, 4: 18.47, 9: 27.88, 39: 72.05}


def draw(position: int = 0, **fields: float) -> Draw:
    values: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 7, **fields}
    return Draw(position=position, **values)  # type: ignore[arg-type]


def logits(seed: int, rows: int = 1, size: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def expected(row: torch.Tensor, *, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """The distribution by definition, in plain Python."""
    weights = {token: math.exp(value / temperature) for token, value in enumerate(row.double().tolist())}
    ranked = sorted(weights, key=lambda token: -weights[token])[: top_k or None]
    total = sum(weights[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    return {token: weights[token] / total / mass for token in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "support"),
    [(1.0, 0, 1.0, 40), (0.7, 5, 1.0, 5), (1.3, 10, 1.0, 10), (1.0, 0, 0.35, None), (2.0, 10, 0.5, None)],
)
def test_frequencies_match_the_distribution(temperature: float, top_k: int, top_p: float, support: int | None) -> None:
    row = logits(3)
    count = 20_000
    draws = [draw(at, temperature=temperature, top_k=top_k, top_p=top_p) for at in range(count)]
    found = [chosen.token for chosen in sample(row.expand(count, -1), draws)]
    probabilities = expected(row[0], temperature=temperature, top_k=top_k, top_p=top_p)
    assert support is None or len(probabilities) == support
    assert set(found) <= set(probabilities)
    chi_square = sum((found.count(token) - count * p) ** 2 / (count * p) for token, p in probabilities.items())
    assert chi_square < CHI_SQUARE_999.get(len(probabilities) - 1, 2.5 * len(probabilities) + 15)


def test_uniform_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    for values in ([uniform(1, at) for at in range(20_000)], [uniform(seed, 0) for seed in range(20_000)]):
        assert all(0 < value < 1 for value in values)
        counts = [0] * 10
        for value in values:
            counts[int(value * 10)] += 1
        assert sum((found - 2000) ** 2 / 2000 for found in counts) < CHI_SQUARE_999[9]


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    rows = logits(5, rows=12)
    source = random.Random(1)
    draws = [
        draw(
            source.randrange(100),
            temperature=source.choice([0.0, 0.5, 1.5]),
            top_k=source.choice([0, 1, 4, 100]),
            top_p=source.choice([1.0, 0.9, 0.2]),
            seed=source.randrange(-(2**63), 2**64),
        )
        for _ in range(12)
    ]
    alone = [sample(rows[at : at + 1], draws[at : at + 1])[0].token for at in range(12)]
    assert [chosen.token for chosen in sample(rows, draws)] == alone
    order = list(range(12))
    source.shuffle(order)
    assert [chosen.token for chosen in sample(rows[order], [draws[at] for at in order])] == [alone[at] for at in order]


def test_greedy_and_its_limits_agree() -> None:
    rows = logits(6, rows=4)
    best = rows.argmax(-1).tolist()
    for fields in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}):
        assert [chosen.token for chosen in sample(rows, [draw(**fields)] * 4)] == best


def test_a_flat_nucleus_reaches_beyond_the_sorted_window() -> None:
    row = torch.zeros(1, 5000)
    found = {chosen.token for chosen in sample(row.expand(600, -1), [draw(at, top_p=0.9) for at in range(600)])}
    assert len(found) > 400  # of 4,500 equally likely ones; the window alone holds 256


def test_a_token_of_no_probability_is_never_drawn() -> None:
    row = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for fields in ({}, {"top_k": 4}, {"top_p": 0.99}):
        draws = [draw(at, **fields) for at in range(500)]
        assert {chosen.token for chosen in sample(row.expand(500, -1), draws)} == {1, 3}


def test_bad_rows_are_told_and_harm_no_other() -> None:
    rows = logits(8, rows=4)
    clean = [chosen.token for chosen in sample(rows, [draw()] * 4)]
    rows[0, 3], rows[1, 3], rows[2] = torch.nan, torch.inf, -torch.inf
    chosen = sample(rows, [draw(), draw(), draw(logprobs=2), draw()])
    assert [item.is_finite for item in chosen] == [False, False, False, True]
    assert chosen[3].token == clean[3]


def test_logprobs_are_those_before_temperature() -> None:
    rows = logits(9, rows=3)
    exact = rows.log_softmax(-1)
    chosen = sample(rows, [draw(temperature=3.0, logprobs=4), draw(), draw(temperature=0.0, logprobs=0)])
    assert chosen[0].logprob == pytest.approx(exact[0, chosen[0].token].item(), abs=1e-6)
    best = exact[0].topk(4)
    assert [token for token, _ in chosen[0].top] == best.indices.tolist()
    assert [value for _, value in chosen[0].top] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert (chosen[1].logprob, chosen[2].top) == (None, ())
    assert chosen[2].logprob == pytest.approx(exact[2].max().item(), abs=1e-6)


def test_bfloat16_logits() -> None:
    rows = logits(10, rows=2).bfloat16()
    assert sample(rows, [draw(temperature=0.0)] * 2)[0].token == int(rows[0].argmax())
    assert all(item.is_finite for item in sample(rows, [draw(top_p=0.5, logprobs=1)] * 2))
