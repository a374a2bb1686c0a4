"""Mixtures: exact shares over any stretch, one order for every world size, sources that end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sihe.core.errors import ConfigError, InvalidInput
from sihe.data.errors import SourceEnded, SourceTooSmall, TokenizerMismatch
from sihe.data.loading import (
    MixtureSource,
    MixtureStage,
    MixtureStream,
    PackedSamples,
    Proportions,
    TokenDataset,
    WindowSamples,
)
from support.token_sets import counting, documents, write_tokens

# ---- proportions ----------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any), st.integers(0, 3000))
def test_no_count_is_a_whole_sample_from_its_due(weights: list[int], first: int) -> None:
    proportions = Proportions(weights)
    shares = np.array(weights) / sum(weights)
    assert proportions.shares == pytest.approx(shares)
    drawn = proportions.sources(0, first + 200)
    counts = np.cumsum(drawn[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, len(drawn) + 1)[:, None] * shares
    assert np.abs(counts - due).max() < 1
    assert np.array_equal(proportions.counts(len(drawn)), counts[-1])
    assert np.array_equal(proportions.sources(first, 200), drawn[first:])


def test_two_to_one_by_hand() -> None:
    assert Proportions([2, 1]).sources(0, 6).tolist() == [0, 1, 0, 0, 1, 0]


def test_decimals_are_exact_and_odd_weights_are_rounded() -> None:
    assert Proportions([0.7, 0.2, 0.1]).counts(10**12).tolist() == [7 * 10**11, 2 * 10**11, 10**11]
    odd = np.array([0.123456789, 3.14159, 1e-9])
    shares = np.array(Proportions(odd.tolist()).shares)
    assert np.abs(shares - odd / odd.sum()).max() < 1.5 / 16384
    assert shares[2] > 0


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.1], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_cannot_be(weights: list[float]) -> None:
    with pytest.raises(ConfigError) as caught:
        Proportions(weights)
    assert caught.value.key == "weights"


# ---- streams --------------------------------------------------------------------------------------------------------

LENGTH = 9


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenDataset]:
    """Three sets of 111, 55 and 22 samples; a token tells its set by its thousands."""
    folder = tmp_path_factory.mktemp("sets")
    sizes = {"a": (0, 1000), "b": (10_000, 500), "c": (20_000, 200)}
    return {name: counting(folder / name, first, count) for name, (first, count) in sizes.items()}


def stream(
    sets: dict[str, TokenDataset],
    stages: list[MixtureStage] | None = None,
    *,
    max_epochs: float = 100.0,
    **changes: int | None,
) -> MixtureStream:
    sources = [MixtureSource(name, WindowSamples(each, "train", LENGTH), max_epochs) for name, each in sets.items()]
    stages = stages or [MixtureStage({"a": 0.5, "b": 0.3, "c": 0.2})]
    return MixtureStream(sources, stages, **{"global_batch": 12, "seed": 5, **changes})  # type: ignore[arg-type]


def first_tokens(source: MixtureStream, batches: int) -> np.ndarray:
    return np.concatenate([next(source).tokens[:, 0] for _ in range(batches)])


def test_batches_hold_whole_samples_of_each_source(sets: dict[str, TokenDataset]) -> None:
    batch = next(stream(sets))
    assert batch.tokens.shape == (12, LENGTH + 1)
    assert np.array_equal(np.diff(batch.tokens), np.ones((12, LENGTH)))
    assert np.bincount(batch.tokens[:, 0] // 10_000).tolist() in ([6, 4, 2], [6, 3, 3])


def test_every_source_is_seen_whole_and_shuffled_in_each_epoch(sets: dict[str, TokenDataset]) -> None:
    source = stream(sets)
    seen = first_tokens(source, 100)
    of_b = seen[seen // 10_000 == 1]
    assert len(of_b) == 360
    epochs = [of_b[start : start + 55] for start in range(0, 330, 55)]
    assert all(np.array_equal(np.sort(epoch), 10_000 + np.arange(55) * LENGTH) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert source.epochs == pytest.approx({"a": 600 / 111, "b": 360 / 55, "c": 240 / 22})
    assert source.shares == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2})


CURRICULUM = [
    MixtureStage({"a": 1}, until_sample=50),
    MixtureStage({"a": 1, "b": 2}, until_sample=131),
    MixtureStage({"c": 0.25, "b": 0.75}),
]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    before=st.integers(0, 20),
    seed=st.integers(0, 9),
    stages=st.sampled_from([None, CURRICULUM]),
)
def test_resumed_at_another_world_size_the_order_is_the_same(
    sets: dict[str, TokenDataset], world_size: int, before: int, seed: int, stages: list[MixtureStage] | None
) -> None:
    whole = stream(sets, stages, seed=seed)
    expected = [next(whole).tokens for _ in range(before + 4)]
    ranks = [
        stream(sets, stages, seed=seed, rank=rank, world_size=world_size, start_sample=12 * before)
        for rank in range(world_size)
    ]
    for step in range(before, before + 4):
        assert np.array_equal(np.concatenate([next(rank).tokens for rank in ranks]), expected[step])
    assert {rank.next_sample for rank in ranks} == {whole.next_sample}


def test_the_order_does_not_depend_on_the_batch_size(sets: dict[str, TokenDataset]) -> None:
    assert np.array_equal(
        first_tokens(stream(sets, CURRICULUM), 20), first_tokens(stream(sets, CURRICULUM, global_batch=5), 48)
    )


def test_a_curriculum_changes_the_weights_where_it_says(sets: dict[str, TokenDataset]) -> None:
    source = stream(sets, CURRICULUM, global_batch=1)
    drawn = first_tokens(source, 400) // 10_000
    assert set(drawn[:50]) == {0}
    assert np.bincount(drawn[50:131]).tolist() == [27, 54]
    assert np.bincount(drawn[131:331], minlength=3).tolist() == [0, 150, 50]
    assert source.shares == pytest.approx({"a": 0, "b": 0.75, "c": 0.25})


def test_a_source_goes_on_where_the_stage_before_left_it(sets: dict[str, TokenDataset]) -> None:
    seen = first_tokens(stream(sets, CURRICULUM, global_batch=1), 131)
    of_a = seen[seen < 10_000]
    assert len(of_a) == len(set(of_a)) == 77


def test_sources_of_one_size_are_shuffled_apart_and_alike_in_any_company(tmp_path: Path) -> None:
    sets = {name: counting(tmp_path / name, 0, 500) for name in ("x", "y")}
    x, y = (first_tokens(stream({name: sets[name]}, [MixtureStage({name: 1})]), 4) for name in sets)
    assert not np.array_equal(x, y)
    both = MixtureStream(
        [MixtureSource(name, WindowSamples(each, "train", LENGTH)) for name, each in sets.items()],
        [MixtureStage({"x": 1, "y": 1})],
        global_batch=2,
        seed=5,
    )
    assert np.array_equal(first_tokens(both, 40)[0::2], x[:40]) or np.array_equal(first_tokens(both, 40)[1::2], x[:40])


# ---- what is refused before the first step --------------------------------------------------------------------------


def test_a_source_that_would_be_seen_too_often_is_refused_at_once(sets: dict[str, TokenDataset]) -> None:
    """22 samples of c, a fifth of all: one epoch is 110 samples."""
    stream(sets, max_epochs=1, stop_sample=108)
    with pytest.raises(SourceEnded, match=r"'c' would be seen 1\.09 times by sample 120 and may be 1 times"):
        stream(sets, max_epochs=1, stop_sample=120)


def test_without_a_last_sample_the_batch_that_repeats_is_refused(sets: dict[str, TokenDataset]) -> None:
    source = stream(sets, max_epochs=1)
    for _ in range(9):
        next(source)
    for _ in range(2):
        with pytest.raises(SourceEnded):
            next(source)
    assert source.next_sample == 108


def test_a_source_smaller_than_its_part_of_a_batch(sets: dict[str, TokenDataset]) -> None:
    with pytest.raises(SourceTooSmall, match="'c' has 22 samples and one global batch takes 24"):
        stream(sets, global_batch=120)


@pytest.mark.parametrize(
    "other", [{"tokenizer": b"{ }"}, {"vocab_size": 99_999}, {"eos_token_id": 7}], ids=["file", "size", "eos"]
)
def test_another_tokenizer_is_refused(sets: dict[str, TokenDataset], tmp_path: Path, other: dict[str, object]) -> None:
    with pytest.raises(TokenizerMismatch, match="prepare both with one"):
        stream({**sets, "d": counting(tmp_path / "d", 30_000, 200, **other)})


def test_sources_must_agree_in_length_and_masks(sets: dict[str, TokenDataset], tmp_path: Path) -> None:
    plain = MixtureSource("a", WindowSamples(sets["a"], "train", LENGTH))
    for other in (
        WindowSamples(sets["b"], "train", LENGTH + 1),
        WindowSamples(sets["b"], "train", LENGTH, masks_documents=True),
    ):
        with pytest.raises(InvalidInput, match="'b'"):
            MixtureStream([plain, MixtureSource("b", other)], [MixtureStage({"a": 1, "b": 1})], global_batch=2, seed=0)


@pytest.mark.parametrize(
    ("stages", "key"),
    [
        ([MixtureStage({"a": 1}, until_sample=9)], "stages"),
        ([MixtureStage({"a": 1}), MixtureStage({"a": 1})], "stages"),
        ([MixtureStage({"a": 1}, 9), MixtureStage({"b": 1}, 9), MixtureStage({"a": 1})], "stages"),
        ([MixtureStage({"z": 1})], "weights"),
        ([MixtureStage({"a": 0})], "weights"),
    ],
)
def test_stages_that_cannot_be(sets: dict[str, TokenDataset], stages: list[MixtureStage], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stream(sets, stages)
    assert caught.value.key == key


def test_packed_and_plain_sources_with_masks_mix(tmp_path: Path) -> None:
    write_tokens(tmp_path / "p", documents([5, 6, 7] * 20), vocab_size=100_000)
    write_tokens(tmp_path / "w", documents([40] * 9), vocab_size=100_000)
    packed, plain = (TokenDataset.open(tmp_path / name) for name in "pw")
    source = MixtureStream(
        [
            MixtureSource("p", PackedSamples(packed, "train", LENGTH)),
            MixtureSource("w", WindowSamples(plain, "train", LENGTH, masks_documents=True)),
        ],
        [MixtureStage({"p": 1, "w": 1})],
        global_batch=8,
        seed=1,
    )
    batch = next(source)
    assert batch.documents is not None
    assert (batch.documents.min(axis=1) == -1).any()  # padding, of packed samples alone
    assert batch.targets.shape == (8, LENGTH)
