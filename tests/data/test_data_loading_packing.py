"""Packing: nothing lost, nothing cut that fits, documents kept apart, one index for all."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.core.errors import InvalidInput
from sihe.data.errors import DatasetTooSmall
from sihe.data.loading import PackedSamples, TokenDataset, WindowSamples, concatenation_report
from sihe.data.loading.packing import best_fit
from support.token_sets import EOS, documents, write_tokens


def dataset(folder: Path, lengths: list[int]) -> TokenDataset:
    return TokenDataset.open(write_tokens(folder, documents(lengths), vocab_size=1_000_000))


# ---- best fit -------------------------------------------------------------------------------------------------------


def _one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Rooms left by the textbook's best-fit decreasing."""
    rooms: list[int] = []
    for length in lengths:
        fitting = [(room, index) for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.data())
def test_placing_by_groups_is_placing_one_by_one(capacity: int, data: st.DataObject) -> None:
    lengths = sorted(data.draw(st.lists(st.integers(1, capacity), max_size=120)), reverse=True)
    sample_of = best_fit(np.array(lengths, np.int64), capacity)
    used: Counter[int] = Counter()
    for sample, length in zip(sample_of.tolist(), lengths, strict=True):
        used[sample] += length
    assert sorted(used) == list(range(len(used)))
    assert sorted(capacity - filled for filled in used.values()) == sorted(_one_by_one(lengths, capacity))


# ---- samples --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40).filter(lambda all_: max(all_) > 1), st.integers(1, 20))
def test_every_prediction_inside_a_document_is_made_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int
) -> None:
    samples = PackedSamples(dataset(tmp_path_factory.mktemp("p") / "s", lengths), "train", sequence_length)
    batch = samples.read(np.arange(len(samples)))
    made = Counter((int(i), int(t)) for i, t in zip(batch.inputs.flat, batch.targets.flat, strict=True) if t != -1)
    wanted = Counter((int(a), int(b)) for each in documents(lengths) for a, b in pairwise(each))
    assert made == wanted
    report = samples.report
    assert report.documents == len(lengths)
    assert report.tokens == int((batch.tokens >= 0).sum())
    assert report.padding == int((batch.tokens < 0).sum())


def test_positions_and_documents_restart(tmp_path: Path) -> None:
    samples = PackedSamples(dataset(tmp_path / "s", [4, 3]), "train", 9)
    batch = samples.read(np.array([0]))
    assert batch.tokens.tolist() == [[1000, 1001, 1002, EOS, 2000, 2001, EOS, -1, -1, -1]]
    assert batch.inputs.tolist() == [[1000, 1001, 1002, EOS, 2000, 2001, EOS, 0, 0]]
    assert batch.targets.tolist() == [[1001, 1002, EOS, -1, 2001, EOS, -1, -1, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch.input_documents is not None
    assert batch.input_documents.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1, -1]]


def test_windows_with_masks(tmp_path: Path) -> None:
    plain = dataset(tmp_path / "s", [4, 3, 5])
    batch = WindowSamples(plain, "train", 5, masks_documents=True).read(np.array([0, 1]))
    assert batch.tokens.tolist() == [[1000, 1001, 1002, EOS, 2000, 2001], [2001, EOS, 3000, 3001, 3002, 3003]]
    assert batch.targets.tolist() == [[1001, 1002, EOS, -1, 2001], [EOS, -1, 3001, 3002, 3003]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 1, 2]]
    unmasked = WindowSamples(plain, "train", 5).read(np.array([0]))
    assert unmasked.targets.tolist() == [[1001, 1002, EOS, 2000, 2001]]
    assert unmasked.positions.tolist() == [[0, 1, 2, 3, 4]]
    assert unmasked.input_documents is None


def test_packing_cuts_fewer_documents_than_concatenation(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(3, 1, 600).astype(int) + 2, 400).tolist()
    text = dataset(tmp_path / "s", lengths)
    packed, concatenated = PackedSamples(text, "train", 127).report, concatenation_report(text, "train", 127)
    longer = sum(length > 128 for length in lengths)
    assert packed.cut_documents == longer
    assert concatenated.cut_share > 2 * packed.cut_share
    assert packed.padding_share < 0.01
    firsts = np.cumsum([0, *lengths])
    by_hand = sum(len({(at - 1) // 127 for at in range(first + 1, last)}) > 1 for first, last in pairwise(firsts))
    assert concatenated.cut_documents == by_hand


def test_a_last_document_without_an_end_counts(tmp_path: Path) -> None:
    write_tokens(tmp_path / "s", [np.array([1, 2, EOS, 3, 4])])
    samples = PackedSamples(TokenDataset.open(tmp_path / "s"), "train", 5)
    assert samples.read(np.array([0])).tokens.tolist() == [[1, 2, EOS, 3, 4, -1]]


def test_nothing_to_predict(tmp_path: Path) -> None:
    write_tokens(tmp_path / "s", [np.zeros(10, int)])
    with pytest.raises(DatasetTooSmall):
        PackedSamples(TokenDataset.open(tmp_path / "s"), "train", 5)
    with pytest.raises(InvalidInput, match="positive"):
        PackedSamples(TokenDataset.open(tmp_path / "s"), "train", 0)


# ---- the index ------------------------------------------------------------------------------------------------------


def test_the_index_is_made_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = dataset(tmp_path / "s", [5, 7, 9, 30])
    first = PackedSamples(text, "train", 9)

    def refuse(*_: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr("sihe.data.loading.packing.pack", refuse)
    again = PackedSamples(text, "train", 9)
    everything = np.arange(len(first))
    assert np.array_equal(again.read(everything).tokens, first.read(everything).tokens)
    assert again.report == first.report
    with pytest.raises(AssertionError, match="packed again"):
        PackedSamples(text, "train", 8)
    assert TokenDataset.open(text.folder).verification == "stamp"


def _pack(folder: Path, results: multiprocessing.Queue[int]) -> None:
    samples = PackedSamples(TokenDataset.open(folder), "train", 9)
    results.put(int(samples.read(np.arange(len(samples))).tokens.sum()))


def test_processes_that_pack_at_the_same_time_agree(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "s", [5, 7, 9, 30] * 50).folder
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[int] = context.Queue()
    ranks = [context.Process(target=_pack, args=(folder, results)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    assert len({results.get(timeout=60) for _ in ranks}) == 1
    for rank in ranks:
        rank.join()
    assert len(list(folder.glob(".packed-*-????????????????"))) == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the refusal is played; what is under test is that packing goes on."""
    text = dataset(tmp_path / "s", [5, 7, 9, 30])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sihe.data.loading.packing.exclusive", refuse)
    assert len(PackedSamples(text, "train", 9)) > 0
    assert not list(text.folder.glob(".packed-*"))
