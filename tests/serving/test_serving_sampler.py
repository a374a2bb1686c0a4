"""Sampling: against exact distributions, and the promise that a seed decides alone."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sihe.serving.engine.compute.cpu.draws import _by_rank
from sihe.serving.engine.history import TokenHistory
from sihe.serving.engine.sampler import Draw, probabilities, sample, score
from sihe.serving.engine.seeds import fork_seed, uniform

VOCABULARY = 40
# Upper 0.1 % points of the chi-square distribution by degrees of freedom (Abramowitz & Stegun, table 26.8).
CHI_SQUARE_999 = {3: 16.27, 4: 18.47, 9: 27.88, 39: 72.05}


def draw(position: int = 0, **fields: object) -> Draw:
    values: dict[str, object] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 7, **fields}
    return Draw(position=position, **values)  # type: ignore[arg-type]


def logits(seed: int, rows: int = 1, size: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def expected(
    row: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> dict[int, float]:
    """The distribution by definition, in plain Python."""
    weights = {token: math.exp(value / temperature) for token, value in enumerate(row.double().tolist())}
    most = max(weights.values())
    weights = {token: weight for token, weight in weights.items() if weight > 0 and weight >= min_p * most}
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
    ("fields", "support"),
    [
        ({}, 40),
        ({"temperature": 0.7, "top_k": 5}, 5),
        ({"temperature": 1.3, "top_k": 10}, 10),
        ({"top_p": 0.35}, None),
        ({"temperature": 2.0, "top_k": 10, "top_p": 0.5}, None),
        ({"temperature": 1.5, "min_p": 0.2}, None),
        ({"min_p": 0.1, "top_p": 0.7}, None),
    ],
)
def test_frequencies_match_the_distribution(fields: dict[str, float], support: int | None) -> None:
    row = logits(3)
    count = 20_000
    found = [chosen.token for chosen in sample(row.expand(count, -1), [draw(at, **fields) for at in range(count)])]
    exact = expected(row[0], **fields)  # type: ignore[arg-type]
    assert support is None or len(exact) == support
    assert set(found) <= set(exact)
    chi_square = sum((found.count(token) - count * p) ** 2 / (count * p) for token, p in exact.items())
    assert chi_square < CHI_SQUARE_999.get(len(exact) - 1, 2.5 * len(exact) + 15)


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 17, 100]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.05, 0.7]),
    }
)


@given(st.lists(SETTINGS, min_size=1, max_size=6), st.integers(0, 1000))
def test_the_probabilities_of_a_row_are_those_by_definition(settings: list[dict[str, float]], seed: int) -> None:
    rows = logits(seed, rows=len(settings))
    found = probabilities(rows, [draw(**fields) for fields in settings])
    for at, fields in enumerate(settings):
        greedy = {int(rows[at].argmax()): 1.0}
        exact = greedy if fields["temperature"] == 0 else expected(rows[at], **fields)
        dense = [exact.get(token, 0.0) for token in range(VOCABULARY)]
        assert found[at].tolist() == pytest.approx(dense, abs=1e-6)


@given(st.lists(SETTINGS, min_size=1, max_size=6), st.integers(0, 1000))
def test_what_is_drawn_has_a_probability(settings: list[dict[str, float]], seed: int) -> None:
    rows = logits(seed, rows=len(settings), size=700)
    draws = [draw(at, **fields) for at, fields in enumerate(settings)]
    exact = probabilities(rows, draws)
    for at, chosen in enumerate(sample(rows, draws)):
        assert exact[at, chosen.token] > 0


def test_a_token_is_found_in_its_block_as_in_the_whole_row() -> None:
    rows = logits(12, rows=300, size=1300) * 3
    draws = [draw(at, temperature=0.8) for at in range(300)]
    ends = (rows.double() / 0.8).softmax(-1).cumsum(-1)
    plain = [int((ends[at] > uniform(7, at)).nonzero()[0]) for at in range(300)]
    assert [chosen.token for chosen in sample(rows, draws)] == plain


@pytest.mark.parametrize("size", [40, 256, 700, 5000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_a_cpu_draws_what_any_device_does(size: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours for float32 in main memory, and torch's operations elsewhere: the same numbers choose the same tokens."""
    source = random.Random(size)
    rows = logits(size, rows=200, size=size) * spread
    rows[::7, ::3] = -torch.inf
    draws = [
        draw(
            at,
            temperature=source.choice([0.3, 1.0, 2.0]),
            top_k=source.choice([0, 0, 1, 5, 100, 10**6]),
            top_p=source.choice([1.0, 0.95, 0.5, 1e-6]),
            min_p=source.choice([0.0, 0.0, 0.1]),
        )
        for at in range(200)
    ]
    ours = [chosen.token for chosen in sample(rows, draws)]
    wider = torch.zeros(200, size + 24)  # rows apart from each other, as they come from padded matrices
    wider[:, :size] = rows
    assert [chosen.token for chosen in sample(wider[:, :size], draws)] == ours
    monkeypatch.setattr("sihe.serving.engine.sampler._is_on_cpu", lambda _: False)
    assert [chosen.token for chosen in sample(rows, draws)] == ours


@pytest.mark.parametrize("is_on_cpu", [True, False])
@pytest.mark.parametrize("fields", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5, "top_k": 2**70}])
def test_a_row_that_has_no_distribution_gives_its_largest_token(
    fields: dict[str, float], is_on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A penalty that is 0 as float32 makes an infinity, and a mask can leave nothing."""
    monkeypatch.setattr("sihe.serving.engine.sampler._is_on_cpu", lambda _: is_on_cpu)
    rows = logits(17, rows=3, size=300)
    rows[0, 7] = 2.0
    draws = [
        draw(history=TokenHistory([7], repetition=1e-300), **fields),
        draw(mask=np.zeros(10, np.int32), **fields),
        draw(**fields),
    ]
    chosen = sample(rows, draws)
    assert chosen[0].token == 7
    assert 0 <= chosen[1].token < 300
    assert chosen[2].token == sample(rows[2:], draws[2:])[0].token
    found = probabilities(rows, draws)
    assert found[0].nonzero()[:, 0].tolist() == [7]
    assert found.sum(-1).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.5), (5, 1.0), (5, 0.5)])
def test_the_kernel_reads_nothing_where_no_token_has_a_weight(top_k: int, top_p: float) -> None:
    # As Python, which minds where an array ends; compiled, it would give what lies before it.
    assert _by_rank.py_func(np.zeros(300, np.float32), np.zeros(2, np.float32), 0.5, top_k, top_p) == 0


# ---- what changes logits ---------------------------------------------------------------------------------------------


def penalised(row: list[float], prompt: list[int], answer: list[int], settings: dict[str, float]) -> list[float]:
    """Penalties by definition: each token looked at alone."""
    result = []
    for token, value in enumerate(row):
        if token in prompt or token in answer:
            value = value / settings["repetition"] if value > 0 else value * settings["repetition"]
        if token in answer:
            value -= settings["presence"] + settings["frequency"] * answer.count(token)
        result.append(value)
    return result


TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=90)
PENALTIES = st.fixed_dictionaries(
    {
        "repetition": st.sampled_from([1.0, 1.3, 0.7]),
        "presence": st.sampled_from([0.0, 1.5, -0.5]),
        "frequency": st.sampled_from([0.0, 0.4]),
    }
)


@given(TOKENS, TOKENS, st.lists(st.integers(0, VOCABULARY - 1), max_size=5), PENALTIES)
def test_penalties_are_those_by_definition(
    prompt: list[int], answer: list[int], drafted: list[int], settings: dict[str, float]
) -> None:
    rows = logits(13, rows=2)
    history = TokenHistory(prompt, **settings)
    for token in answer:
        history.push(token)
    draws = [draw(history=history, drafted=tuple(drafted)), draw()]
    found = probabilities(rows, draws)
    exact = torch.tensor(penalised(rows[0].tolist(), prompt, answer + drafted, settings)).double().softmax(-1)
    assert found[0].tolist() == pytest.approx(exact.tolist(), abs=1e-6)
    assert found[1].tolist() == pytest.approx(rows[1].double().softmax(-1).tolist(), abs=1e-6)
    again = probabilities(rows, [draw(history=history), draw()])  # what was only drafted has left no trace
    exact = torch.tensor(penalised(rows[0].tolist(), prompt, answer, settings)).double().softmax(-1)
    assert again[0].tolist() == pytest.approx(exact.tolist(), abs=1e-6)


def test_bias_adds_and_a_mask_excludes() -> None:
    rows = logits(14, rows=3, size=70)
    allowed = {1, 31, 32, 63, 64}
    bits = np.zeros(3, dtype=np.uint32)
    for token in allowed:
        bits[token // 32] |= np.uint32(1 << (token % 32))
    draws = [draw(bias=((5, 4.0), (69, -100.0), (9999, 1.0))), draw(mask=bits.view(np.int32)), draw()]
    found = probabilities(rows, draws)
    biased = rows[0].clone()
    biased[5] += 4
    biased[69] -= 100
    assert found[0].tolist() == pytest.approx(biased.double().softmax(-1).tolist(), abs=1e-6)
    assert set(found[1].nonzero()[:, 0].tolist()) == allowed
    only = rows[1][sorted(allowed)].double().softmax(-1)
    assert found[1][sorted(allowed)].tolist() == pytest.approx(only.tolist(), abs=1e-6)
    assert found[2].tolist() == pytest.approx(rows[2].double().softmax(-1).tolist(), abs=1e-6)


def test_what_is_banned_comes_only_where_the_mask_leaves_nothing_else() -> None:
    row = torch.tensor([[5.0, 1.0, 0.0]])
    only_first = np.array([0b001], dtype=np.int32)
    first_two = np.array([0b011], dtype=np.int32)
    for mask, token in ((None, 1), (first_two, 1), (only_first, 0)):
        assert sample(row, [draw(temperature=0.0, banned=(0,), mask=mask)])[0].token == token


def test_log_probabilities_are_the_models_whatever_chooses() -> None:
    rows = logits(15, rows=1)
    best = int(rows[0].argmax())
    chosen = sample(rows, [draw(temperature=0.0, bias=((best, -100.0),), logprobs=1)])[0]
    assert chosen.token != best
    assert chosen.top[0][0] == best
    assert chosen.logprob == pytest.approx(float(rows.log_softmax(-1)[0, chosen.token]), abs=1e-6)


def test_a_text_is_scored_as_by_the_whole_matrix() -> None:
    rows = logits(16, rows=150)
    tokens = [at % VOCABULARY for at in range(150)]
    exact = rows.log_softmax(-1)
    scored = score(rows, tokens, 3)
    assert [item.logprob for item in scored] == pytest.approx([float(exact[at, tokens[at]]) for at in range(150)])
    assert [[id for id, _ in item.top] for item in scored] == exact.topk(3).indices.tolist()


def test_choices_have_seeds_of_their_own() -> None:
    seeds = {fork_seed(seed, index) for seed in range(50) for index in range(20)}
    assert len(seeds) == 1000
    assert fork_seed(5, 0) == 5


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
