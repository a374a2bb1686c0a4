"""Speculation: what is proposed, what is kept, that no distribution changes, and when it is worth it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from sihe.core.clock import FakeClock
from sihe.core.errors import ConfigError
from sihe.serving.engine.compute.step import Feed
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.draft import DraftModel, load_proposer
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.ports import EngineObserver, NoObserver, StepStats
from sihe.serving.engine.prompt_index import PromptIndex
from sihe.serving.engine.runner import ModelRunner
from sihe.serving.engine.sampler import Draw, Sampled, probabilities, sample
from sihe.serving.engine.speculation import (
    Kept,
    Pace,
    Proposal,
    StepTimes,
    agree,
    drafting,
    verify,
    worthwhile,
)
from sihe.serving.engine.tokenizer import ModelTokenizer
from sihe.serving.engine.types import Constraint, GenerationRequest
from support.tiny_models import tiny_config, tiny_model

# ---- proposals from the text -----------------------------------------------------------------------------------------


@given(tokens=st.lists(st.integers(0, 3), max_size=60), cut=st.integers(0, 60), most=st.integers(1, 5))
def test_an_index_proposes_what_followed_the_longest_earlier_match(tokens: list[int], cut: int, most: int) -> None:
    index = PromptIndex(tokens[:cut])
    index.extend(tokens[cut:])
    expected: tuple[int, ...] = ()
    for size in (3, 2):  # brute force: the latest earlier place where the last `size` tokens stand
        ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
        if ends and len(tokens) >= size:
            expected = tuple(tokens[ends[-1] : ends[-1] + most])
            break
    assert index.next(most) == expected
    assert len(index) == len(tokens)


# ---- what is kept ----------------------------------------------------------------------------------------------------


def draw(seed: int, position: int, **fields: object) -> Draw:
    return Draw(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": seed, "position": position, **fields})  # type: ignore[arg-type]


def test_the_models_own_choices_count_up_to_the_first_other_one() -> None:
    chosen = [Sampled(token, is_finite=True) for token in (5, 6, 7, 8)]
    assert agree(chosen, (5, 6, 7)) == tuple(chosen)
    assert agree(chosen, (5, 9, 7)) == tuple(chosen[:2])
    assert agree(chosen[:1], ()) == tuple(chosen[:1])
    assert agree([Sampled(5, is_finite=False), *chosen[1:]], (5, 6, 7)) == (Sampled(5, is_finite=False),)


SHAPES = [{}, {"temperature": 0.6, "bias": ((1, 2.0), (3, -1.0))}, {"top_k": 5, "top_p": 0.9, "min_p": 0.02}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_verified_tokens_are_distributed_as_the_model_alone_would_have_them(shape: dict[str, object]) -> None:
    """Two places, the second of which is only reached through the first: the joint distribution of both.

    Chi-square over 2,500 seeds; the threshold keeps false alarms of all cases together below one in a thousand.
    """
    source = torch.Generator().manual_seed(3)
    vocabulary, count = 6, 2500
    first_V, draft_first_V = torch.randn(2, vocabulary, generator=source) * 1.5
    second_VV, draft_second_VV = torch.randn(2, vocabulary, vocabulary, generator=source) * 1.5
    third_V = torch.randn(vocabulary, generator=source)
    places = [[draw(seed, place, **shape) for seed in range(count)] for place in range(3)]

    def drafts(logits_BV: Tensor, place: int) -> tuple[list[int], Tensor]:
        draws = [drafting(item) for item in places[place]]
        return [item.token for item in sample(logits_BV, draws)], probabilities(logits_BV, draws)

    ones, q_ones_BV = drafts(draft_first_V.expand(count, -1), 0)
    twos, q_twos_BV = drafts(draft_second_VV[torch.tensor(ones)], 1)
    seen: Counter[tuple[int, int]] = Counter()
    for seed in range(count):
        proposal = Proposal((ones[seed], twos[seed]), torch.stack([q_ones_BV[seed], q_twos_BV[seed]]))
        logits_KV = torch.stack([first_V, second_VV[ones[seed]], third_V])
        draws = [places[place][seed] for place in range(3)]
        kept = [item.token for item in verify(logits_KV, draws, proposal)]
        if len(kept) == 1:  # the engine goes on from here in its next step: so does this
            kept.append(sample(second_VV[kept[0]][None], [draws[1]])[0].token)
        seen[kept[0], kept[1]] += 1
    p_V = probabilities(first_V[None], [draw(0, 0, **shape)])[0]
    p_VV = probabilities(second_VV, [draw(0, 0, **shape)] * vocabulary)
    expected = {
        (first, second): float(p_V[first] * p_VV[first, second]) * count
        for first in range(vocabulary)
        for second in range(vocabulary)
    }
    assert all(expected[pair] > 0 for pair in seen), "a token that the model would never say"
    assert chi_square(seen, expected) > 1e-4


def chi_square(seen: Counter[tuple[int, int]], expected: dict[tuple[int, int], float]) -> float:
    """The p-value; rare pairs are counted as one."""
    common = [pair for pair, count in expected.items() if count >= 5]
    rest = sum(count for pair, count in expected.items() if count < 5)
    observed = [seen[pair] for pair in common]
    wanted = [expected[pair] for pair in common]
    if rest >= 1:
        observed.append(sum(seen.values()) - sum(observed))
        wanted.append(rest)
    total = sum(observed)
    return float(stats.chisquare(observed, [count * total / sum(wanted) for count in wanted]).pvalue)


def test_a_wrong_rule_would_be_seen() -> None:
    """The same test fails where every proposal is kept: it can fail."""
    source = torch.Generator().manual_seed(3)
    p_V, q_V = (torch.randn(2, 8, generator=source) * 1.5).softmax(-1).double()
    seen = Counter((sample(q_V.log()[None].float(), [draw(seed, 0)])[0].token, 0) for seed in range(3000))
    expected = {(token, 0): float(p_V[token]) * 3000 for token in range(8)}
    assert chi_square(seen, expected) < 1e-6


def test_more_is_kept_the_nearer_the_proposals_are() -> None:
    """A token is kept with probability sum min(p, q), the most that any exact rule can keep."""
    source = torch.Generator().manual_seed(5)
    p_V, q_V = torch.randn(2, 50, generator=source)
    both = [probabilities(row_V[None], [draw(0, 0)])[0] for row_V in (p_V, q_V)]
    overlap = float(torch.minimum(*both).sum())
    kept = 0
    for seed in range(3000):
        draws = [draw(seed, 0), draw(seed, 1)]
        token = sample(q_V[None], [drafting(draws[0])])[0].token
        kept += len(verify(torch.stack([p_V, p_V]), draws, Proposal((token,), both[1][None]))) == 2
    assert abs(kept / 3000 - overlap) < 0.04  # four standard deviations


def test_logits_that_are_not_numbers_are_no_answer() -> None:
    logits_KV = torch.full((2, 4), torch.nan)
    found = verify(logits_KV, [draw(0, 0), draw(0, 1)], Proposal((1,), torch.full((1, 4), 0.25)))
    assert [item.is_finite for item in found] == [False]


def test_logprobs_are_those_of_the_model() -> None:
    logits_KV = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    draws = [draw(1, place, logprobs=2) for place in range(2)]
    found = verify(logits_KV, draws, Proposal((2,), torch.tensor([[0.0, 0.0, 1e-9]]).double()))
    assert found[0].token == 2  # the model likes it more than whoever proposed it
    for item, row_V in zip(found, logits_KV.log_softmax(-1), strict=True):
        assert item.logprob == pytest.approx(float(row_V[item.token]))
        assert [token for token, _ in item.top] == row_V.topk(2).indices.tolist()


# ---- how many to try -------------------------------------------------------------------------------------------------


def test_steps_are_a_line_through_what_was_measured() -> None:
    times = StepTimes()
    assert (times.per_token_s, times.step_s(8)) == (0.0, 0.0)
    times.add(8, 0.020)
    assert (times.per_token_s, times.step_s(8)) == (0.0, pytest.approx(0.020))
    for tokens in (8, 16, 40, 24, 8):
        times.add(tokens, 0.012 + 0.001 * tokens)
    assert times.per_token_s == pytest.approx(0.001)
    assert times.step_s(100) == pytest.approx(0.112)
    for _ in range(1000):  # all steps alike: the slope that was known stays known
        times.add(8, 0.020)
    assert times.per_token_s == pytest.approx(0.001, rel=1e-3)


@given(acceptance=st.floats(0, 1), price=st.floats(0, 1.5), most=st.integers(0, 8))
def test_as_many_are_tried_as_pay(acceptance: float, price: float, most: int) -> None:
    tries = worthwhile(acceptance, most, price)
    assert 0 <= tries <= most
    for place in range(1, most + 1):  # by definition, but for what rounding blurs
        if acceptance**place > price * (1 + 1e-6):
            assert tries >= place
        if acceptance**place < price * (1 - 1e-6):
            assert tries < place


def paced(per_token_s: float) -> Pace:
    pace = Pace(4)
    for tokens in (8, 16, 40, 8, 24):
        pace.add_step(tokens, 0.010 + per_token_s * tokens)
    return pace


def test_a_batch_that_is_bound_by_arithmetic_tries_nothing() -> None:
    assert paced(0.0).tries(Kept(), batch=8) == 4  # reading the weights takes the time: tokens are free
    pace = paced(0.010)
    assert pace.tries(Kept(), batch=1) == 1  # half of a step is the token's own
    assert pace.tries(Kept(), batch=32) == 0


def test_proposals_that_are_refused_are_given_up_and_tried_again_later() -> None:
    pace, kept = paced(0.001), Kept()
    assert pace.tries(kept, batch=8) > 0
    for _ in range(30):
        pace.add_outcome(kept, 4, 0)
    tries = [pace.tries(kept, batch=8) for _ in range(64)]
    assert tries == ([0] * 31 + [1]) * 2
    for _ in range(30):
        pace.add_outcome(kept, 4, 4)
    assert pace.tries(kept, batch=8) >= 3


def test_a_slow_draft_model_is_asked_for_less() -> None:
    pace = paced(0.0)
    for _ in range(200):
        pace.add_drafting(4, 0.028)  # 7 ms a round beside steps of 10 ms
    assert pace.tries(Kept(), batch=8) == 0
    assert pace.tries(Kept(kept=30, lost=1), batch=8) > 0


# ---- in an engine ----------------------------------------------------------------------------------------------------


class Watch(NoObserver):
    """Counts drafts."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0

    def on_step(self, stats: StepStats) -> None:
        self.drafted += stats.drafted_tokens
        self.accepted += stats.accepted_tokens


@pytest.fixture(scope="module")
def near_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A draft model that often says what the model does: its weights, slightly off."""
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path_factory.mktemp("models") / "near", config=tiny_config(eos=False))
    weights = load_file(model_folder / "model.safetensors")
    torch.manual_seed(1)
    noisy = {name: weight + 0.03 * weight.std() * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config(kind: str, draft: Path, **fields: object) -> EngineConfig:
    values = {"max_batch_size": 6, "token_budget": 40, "speculation": kind, **fields}
    return EngineConfig(**values, draft_model=str(draft) if kind == "draft" else None)  # type: ignore[arg-type]


def timeless(folder: Path, settings: EngineConfig, observer: EngineObserver | None = None) -> Engine:
    """An engine whose clock stands still: steps cost nothing, so as many tokens are tried as may be."""
    runner, tokenizer = ModelRunner.load(folder, settings), ModelTokenizer.load(folder)
    proposer = load_proposer(settings, tokenizer, runner)
    clock = FakeClock()
    return Engine(runner, tokenizer, settings, name="timeless", proposer=proposer, observer=observer, clock=clock)


def asked(count: int, seed: int) -> list[GenerationRequest]:
    """Greedy and seeded requests; some repeat themselves, some are penalised for it, some are constrained."""
    source = random.Random(seed)
    extras: list[dict[str, object]] = [
        {},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0.7, "top_p": 0.8, "seed": 4, "logprobs": 2},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"logit_bias": ((9, 4.0),), "min_tokens": 5},
        {"constraint": Constraint("regex", "[a-f]{4,60}")},
    ]
    return [
        GenerationRequest(
            prompt=tuple(source.randrange(5, 12) for _ in range(source.choice([3, 20, 45]))),
            max_tokens=source.randrange(2, 50),
            **{"temperature": 0.0, **extras[number % len(extras)]},  # type: ignore[arg-type]
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("kind", ["ngram", "draft"])
def test_greedy_and_seeded_answers_are_the_same_with_proposals(
    model_folder: Path, near_folder: Path, kind: str
) -> None:
    requests = asked(18, seed=1)
    with Engine.load(model_folder, EngineConfig(max_batch_size=1, token_budget=512)) as engine:
        plain = [engine.submit(request).result(30) for request in requests]
    watch = Watch()
    with timeless(model_folder, config(kind, near_folder), watch) as engine:
        streams = [engine.submit(request) for request in requests]
        for stream, expected in zip(streams, plain, strict=True):
            answer = stream.result(30)
            assert (answer.text, answer.token_ids, answer.finish_reason) == (
                expected.text,
                expected.token_ids,
                expected.finish_reason,
            )
            values = [item.logprob for item in expected.logprobs]
            assert [item.logprob for item in answer.logprobs] == pytest.approx(values, abs=1e-4)
        engine.close()
        assert engine._pool.num_used == 0
        if isinstance(proposer := engine._speculation._proposer, DraftModel):  # type: ignore[union-attr]
            assert proposer.num_used_blocks == 0
    assert watch.accepted > 20
    assert watch.drafted >= watch.accepted


def test_unseeded_answers_are_distributed_as_without_proposals(model_folder: Path, near_folder: Path) -> None:
    """The second and third token of many short answers, with a draft model and by the model's own probabilities."""
    count = 1500
    request = GenerationRequest(prompt=(7, 9), max_tokens=4, temperature=0.6, top_k=4)
    watch = Watch()
    settings = config("draft", near_folder, max_batch_size=32, token_budget=200, max_waiting=2000)
    with timeless(model_folder, settings, watch) as engine:
        streams = [engine.submit(request) for _ in range(count)]
        answers = [stream.result(60).token_ids for stream in streams]
        seen = Counter((answer[1], answer[2]) for answer in answers)
    assert watch.accepted > count / 2
    reference = ModelRunner.load(model_folder, EngineConfig())
    expected: dict[tuple[int, int], float] = {}
    for first, p_first in following(reference, (7, 9), request):
        for second, p_second in following(reference, (7, 9, first), request):
            for third, p_third in following(reference, (7, 9, first, second), request):
                pair = (second, third)
                expected[pair] = expected.get(pair, 0.0) + count * p_first * p_second * p_third
    assert set(seen) <= set(expected)
    assert chi_square(seen, expected) > 1e-4


def following(runner: ModelRunner, tokens: Sequence[int], request: GenerationRequest) -> list[tuple[int, float]]:
    """The tokens that may follow, with their probabilities."""
    logits_1V = runner.forward([Feed(tokens, 0, [0], num_logits=1)])
    p_V = probabilities(logits_1V, [draw(0, 0, temperature=request.temperature, top_k=request.top_k)])[0]
    return [(int(token), float(p_V[token])) for token in p_V.nonzero()[:, 0]]


def test_a_draft_model_that_fails_ends_speculation_and_no_request(
    model_folder: Path, near_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerationRequest(prompt=(7, 9), max_tokens=20, temperature=0)

    def broken(*_: object) -> None:
        raise RuntimeError("no drafts today")

    with timeless(model_folder, config("draft", near_folder)) as engine:
        expected = engine.submit(request).result(30)
        monkeypatch.setattr(DraftModel, "propose", broken)
        assert engine.submit(request).result(30).token_ids == expected.token_ids
        assert engine.submit(request).result(30).token_ids == expected.token_ids


def test_a_draft_cache_that_is_too_small_for_all_serves_whom_it_can(model_folder: Path, near_folder: Path) -> None:
    request = GenerationRequest(prompt=tuple(range(5, 60)), max_tokens=30, temperature=0)
    with timeless(model_folder, config("draft", near_folder)) as engine:
        expected = engine.submit(request).result(30).token_ids
    with timeless(model_folder, config("draft", near_folder)) as engine:
        proposer = engine._speculation._proposer  # type: ignore[union-attr]
        assert isinstance(proposer, DraftModel)
        proposer._pool.allocate(proposer._pool.num_blocks - 8)  # one sequence of 128 tokens is left
        streams = [engine.submit(request) for _ in range(6)]
        assert all(stream.result(30).token_ids == expected for stream in streams)


def test_settings_that_make_no_sense_are_refused(tmp_path: Path, model_folder: Path) -> None:
    for bad in ({"speculation": "psychic"}, {"speculation": "draft"}, {"draft_model": "x"}, {"draft_tokens": 0}):
        with pytest.raises(ConfigError):
            EngineConfig.from_mapping(bad)
    other = tiny_model(tmp_path / "other", config=tiny_config(eos=False))
    text = (other / "tokenizer.json").read_text(encoding="utf-8").replace('"<|user|>"', '"<|nobody|>"')
    (other / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="has other tokens than the model"):
        Engine.load(model_folder, config("draft", other))
