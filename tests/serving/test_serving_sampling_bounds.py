"""How far a request's sampling may go, and that the kernels draw by definition as far as that: down to subnormals."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.serving.engine.history import TokenHistory
from sihe.serving.engine.sampler import Draw, probabilities, sample
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import InvalidRequest

VOCABULARY = 300
LEAST = 5e-324  # the smallest number above 0
BOUNDS = {
    "temperature": (0.0, 2.0),
    "top_p": (LEAST, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "logit_bias": (-100.0, 100.0),
}


def request(name: str, value: float) -> GenerationRequest:
    given: dict[str, Any] = {name: ((3, value),) if name == "logit_bias" else value}
    return GenerationRequest(prompt=(1, 2), **given)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_outside_of_its_bounds_is_refused_by_name(name: str) -> None:
    low, high = BOUNDS[name]
    for value in (math.nan, math.inf, -math.inf, 1e300, -1e300, math.nextafter(high, math.inf)):
        with pytest.raises(InvalidRequest, match=rf"{name} must be .* got {re.escape(repr(value))}$") as caught:
            request(name, value)
        assert caught.value.parameter == name
    with pytest.raises(InvalidRequest, match=f"{name} must be"):
        request(name, math.nextafter(low, -math.inf))


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_inside_is_taken_however_small(name: str) -> None:
    low, high = BOUNDS[name]
    for value in (low, high, LEAST, 1e-300, 1e-45, -LEAST):
        if low <= value <= high:
            request(name, value)


def within(low: float, high: float, *special: float) -> st.SearchStrategy[float]:
    """Numbers from `low` to `high`, often at the edges of what a float is."""
    edges = [low, high, *special, *(at for at in (LEAST, 1e-300, 1e-45, 1e-38, 1e-7) if low <= at <= high)]
    return st.one_of(st.sampled_from(edges), st.floats(low, high))


LOGITS = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from([0.0, 1e-45, -1e-38, 1e30, -1e30, 3.4e38, -3.4e38, -math.inf]),
)
DRAWS = st.fixed_dictionaries(
    {
        "temperature": within(*BOUNDS["temperature"], 1e-6, 0.01),
        "top_p": within(*BOUNDS["top_p"], math.nextafter(1.0, 0.0), 0.5),
        "min_p": within(*BOUNDS["min_p"], math.nextafter(1.0, 0.0), 0.5),
        "top_k": st.sampled_from([0, 1, 2, 40, VOCABULARY, 2**70]),
        "position": st.integers(0, 1000),
        "repetition": within(*BOUNDS["repetition_penalty"], 1.0),
        "presence": within(*BOUNDS["presence_penalty"], 0.0, -LEAST),
        "frequency": within(*BOUNDS["frequency_penalty"], 0.0, -LEAST),
        "bias": st.dictionaries(st.integers(0, VOCABULARY - 1), within(*BOUNDS["logit_bias"], 0.0), max_size=4),
        "said": st.lists(st.integers(0, VOCABULARY - 1), max_size=8),
    }
)


def drawn(fields: dict[str, Any]) -> Draw:
    history = TokenHistory(
        [1, 2],
        repetition=fields["repetition"],
        presence=fields["presence"],
        frequency=fields["frequency"],
    )
    for token in fields["said"]:
        history.push(token)
    return Draw(
        temperature=fields["temperature"],
        top_k=fields["top_k"],
        top_p=fields["top_p"],
        min_p=fields["min_p"],
        seed=7,
        position=fields["position"],
        history=history,
        bias=tuple(fields["bias"].items()),
    )


def adjusted(row: list[float], fields: dict[str, Any]) -> list[np.float32]:
    """Logits after penalties and bias, by definition and one by one, each step in float32 as it is computed."""
    said, result = fields["said"], []
    repetition, presence, frequency = (np.float32(fields[name]) for name in ("repetition", "presence", "frequency"))
    with np.errstate(all="ignore"):
        for token, logit in enumerate(row):
            value = np.float32(logit)
            if token in (1, 2, *said) if repetition != 1 else token in said:
                value = value / repetition if value > 0 else value * repetition
            if token in said:
                value = value - (presence + frequency * np.float32(said.count(token)))
            result.append(value + np.float32(fields["bias"].get(token, 0.0)))
    return result


def possible(values: list[np.float32], fields: dict[str, Any]) -> set[int]:
    """The tokens that may be drawn, by definition in float64; what rounding in float32 decides is left open."""
    best = max(values)
    if not np.isfinite(best) or fields["temperature"] == 0:
        return {token for token, value in enumerate(values) if value == best}
    temperature = max(fields["temperature"], 1e-6)
    scaled = [(float(value) - float(best)) / temperature for value in values]
    least = max(math.log(fields["min_p"]), -110.0) if fields["min_p"] > 0 else -110.0  # less is 0 as float32
    near = 1e-5 * max(1.0, -least)
    weights = {token: math.exp(value) for token, value in enumerate(scaled) if value >= least - near}
    ranked = sorted(weights, key=lambda token: -weights[token])
    ties = weights[ranked[min(fields["top_k"] or len(ranked), len(ranked)) - 1]] * (1 - 1e-5)
    ranked = [token for token in ranked if weights[token] >= ties]
    total, mass, kept, last = sum(weights[token] for token in ranked), 0.0, set(), math.inf
    for token in ranked:
        if mass / total >= fields["top_p"] + 1e-5 and weights[token] < last * (1 - 1e-5):
            break
        kept.add(token)
        mass, last = mass + weights[token], weights[token]
    return kept


@pytest.mark.parametrize("is_on_cpu", [True, False])
@settings(max_examples=150, deadline=None)  # the first one compiles kernels
@given(
    row=st.lists(LOGITS, min_size=3, max_size=12),
    places=st.randoms(use_true_random=False),
    several=st.lists(DRAWS, min_size=1, max_size=3),
)
def test_at_every_extreme_a_token_is_drawn_that_may_be(
    is_on_cpu: bool, row: list[float], places: Any, several: list[dict[str, Any]]
) -> None:
    values = [-math.inf] * VOCABULARY
    for place, value in zip(places.sample(range(VOCABULARY), len(row)), row, strict=True):
        values[place] = value
    values[places.randrange(VOCABULARY)] = 1.0  # the model's own logits are finite
    rows, draws = torch.tensor([values] * len(several)), [drawn(fields) for fields in several]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sihe.serving.engine.sampler._is_on_cpu", lambda _: is_on_cpu)
        found, spread = sample(rows, draws), probabilities(rows, draws)
    for at, fields in enumerate(several):
        kept = possible(adjusted(values, fields), fields)
        assert found[at].is_finite
        assert found[at].token in kept
        assert torch.isfinite(spread[at]).all()
        assert float(spread[at].sum()) == pytest.approx(1.0)
        assert set(spread[at].nonzero()[:, 0].tolist()) <= kept
