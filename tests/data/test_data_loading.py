"""Data sets on disk: written whole, checked, memory-mapped; streams resume anywhere at any world size."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sihe.core.errors import AlreadyExists, CorruptData, InvalidInput, NoSpace, NotFound
from sihe.data.errors import DatasetTooSmall
from sihe.data.loading import BatchStream, TokenDataset, write_dataset


def make(
    folder: Path, tokens: np.ndarray, *, vocab_size: int = 1000, shard_tokens: int = 64, held_out: int = 30
) -> TokenDataset:
    with write_dataset(
        folder,
        name="toy",
        version="1",
        vocab_size=vocab_size,
        eos_token_id=0,
        created_at="2026-01-01T00:00:00+00:00",
        lineage=("table:documents@3",),
        shard_tokens=shard_tokens,
    ) as writer:
        for start in range(0, len(tokens), 37):
            writer.append("train", tokens[start : start + 37])
        writer.append("held_out", np.arange(held_out))
        writer.add_file("tokenizer.json", b"{}")
    return TokenDataset.open(folder)


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return make(tmp_path / "set", np.arange(1000) % 1000)


def test_what_was_written_is_read(dataset: TokenDataset) -> None:
    train = dataset.split("train")
    assert dataset.num_tokens("train") == 1000
    assert dataset.num_tokens("held_out") == 30
    assert np.array_equal(train.tokens(0, 1000), np.arange(1000))
    assert len(dataset.manifest.splits["train"]) == 16
    assert dataset.manifest.lineage == ("table:documents@3",)
    assert dataset.manifest.dtype == "uint16"


@given(st.lists(st.integers(0, 990), max_size=20), st.integers(0, 10))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows_agree_with_slicing(dataset: TokenDataset, starts: list[int], length: int) -> None:
    tokens = np.arange(1000)
    found = dataset.split("train").windows(np.array(starts, np.int64), length)
    expected = np.array([tokens[start : start + length] for start in starts]).reshape(len(starts), length)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected)


def test_windows_longer_than_a_shard(dataset: TokenDataset) -> None:
    assert np.array_equal(dataset.split("train").tokens(10, 400), np.arange(10, 400))


@pytest.mark.parametrize(("start", "length"), [(-1, 3), (998, 3), (0, 1001)])
def test_windows_outside_are_refused(dataset: TokenDataset, start: int, length: int) -> None:
    with pytest.raises(InvalidInput, match="1,000 tokens"):
        dataset.split("train").windows(np.array([start]), length)


def test_large_vocabularies_use_wider_tokens(tmp_path: Path) -> None:
    tokens = np.array([0, 65_535, 65_536, 99_999] * 5)
    dataset = make(tmp_path / "set", tokens, vocab_size=100_000)
    assert dataset.manifest.dtype == "uint32"
    assert np.array_equal(dataset.split("train").tokens(0, 20), tokens)


@pytest.mark.parametrize("wrong", [-1, 1000])
def test_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path, wrong: int) -> None:
    with pytest.raises(InvalidInput, match="token ids"):
        make(tmp_path / "set", np.array([1, wrong]))
    assert not (tmp_path / "set").exists()


def test_a_data_set_never_changes(dataset: TokenDataset) -> None:
    with pytest.raises(AlreadyExists):
        make(dataset.folder, np.arange(10))


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_names_the_shard(dataset: TokenDataset) -> None:
    shard = dataset.folder / "train-00007.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    with pytest.raises(CorruptData, match=r"train-00007\.bin.*SHA-256.*prepare it again"):
        TokenDataset.open(dataset.folder)
    assert TokenDataset.open(dataset.folder, verify=False).verification == "skipped"


def test_a_flipped_bit_that_left_no_trace_is_found_by_asking_again(dataset: TokenDataset) -> None:
    """The disk changed a byte itself: no time stamp moved. Here the stamp is made to claim what the files show."""
    shard = dataset.folder / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    stamp_file = dataset.folder / ".verified.json"
    stamp = json.loads(stamp_file.read_bytes())
    status = shard.stat()
    stamp["files"]["train-00000.bin"] = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    stamp_file.write_text(json.dumps(stamp))
    assert TokenDataset.open(dataset.folder).verification == "stamp"
    with pytest.raises(CorruptData):
        TokenDataset.open(dataset.folder, verify="again")
    stamp["at"] -= 25 * 3600
    stamp_file.write_text(json.dumps(stamp))
    with pytest.raises(CorruptData):
        TokenDataset.open(dataset.folder)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_and_missing_shards(dataset: TokenDataset, verify: bool) -> None:
    shard = dataset.folder / "train-00003.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    with pytest.raises(CorruptData, match=r"train-00003\.bin"):
        TokenDataset.open(dataset.folder, verify=verify)
    shard.unlink()
    with pytest.raises(CorruptData, match=r"train-00003\.bin.*missing"):
        TokenDataset.open(dataset.folder, verify=verify)


def test_a_damaged_tokenizer_is_found(dataset: TokenDataset) -> None:
    (dataset.folder / "tokenizer.json").write_bytes(b"{ }")
    with pytest.raises(CorruptData, match=r"tokenizer\.json"):
        TokenDataset.open(dataset.folder)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b'{"format": "other"}'])
def test_a_damaged_manifest(dataset: TokenDataset, damage: bytes) -> None:
    (dataset.folder / "dataset.json").write_bytes(damage)
    with pytest.raises(CorruptData, match=r"dataset\.json"):
        TokenDataset.open(dataset.folder)


def test_a_changed_number_in_the_manifest(dataset: TokenDataset) -> None:
    path = dataset.folder / "dataset.json"
    path.write_text(path.read_text().replace('"vocab_size": 1000', '"vocab_size": 1001'))
    with pytest.raises(CorruptData, match="digest"):
        TokenDataset.open(dataset.folder)


def test_a_manifest_of_the_future(dataset: TokenDataset) -> None:
    path = dataset.folder / "dataset.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(InvalidInput, match="format version 9"):
        TokenDataset.open(dataset.folder)


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="sihe text prepare"):
        TokenDataset.open(tmp_path)


def test_the_first_open_hashes_and_the_second_reads_the_stamp(dataset: TokenDataset) -> None:
    assert dataset.verification == "hashed"
    assert TokenDataset.open(dataset.folder).verification == "stamp"
    os.utime(dataset.folder / "train-00000.bin")
    assert TokenDataset.open(dataset.folder).verification == "hashed"


def _open_and_report(folder: Path, results: multiprocessing.Queue[str]) -> None:
    results.put(TokenDataset.open(folder).verification)


def test_of_many_ranks_one_hashes(dataset: TokenDataset) -> None:
    (dataset.folder / ".verified.json").unlink()
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    ranks = [context.Process(target=_open_and_report, args=(dataset.folder, results)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    assert sorted(results.get(timeout=60) for _ in ranks) == ["hashed", "stamp"]
    for rank in ranks:
        rank.join()


def test_a_folder_without_write_permission_is_still_checked(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the refusal is played; what is under test is that checking goes on."""
    (dataset.folder / ".verified.json").unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sihe.data.loading.dataset.exclusive", refuse)
    assert TokenDataset.open(dataset.folder).verification == "hashed"
    shard = dataset.folder / "train-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(CorruptData):
        TokenDataset.open(dataset.folder)


@pytest.mark.parametrize("verify", [True, "again"])
def test_token_ids_that_the_vocabulary_does_not_have(dataset: TokenDataset, verify: bool) -> None:
    """Bytes as they were written, under a manifest that promises fewer ids."""
    (dataset.folder / "dataset.json").write_bytes(replace(dataset.manifest, vocab_size=998).to_json())
    with pytest.raises(CorruptData, match=r"train-00015\.bin.*token id 999 and the vocabulary has 998 ids"):
        TokenDataset.open(dataset.folder, verify=verify)


# ---- a writer that dies ---------------------------------------------------------------------------------------------

_WRITER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from sihe.data.loading import write_dataset
with write_dataset(Path(sys.argv[1]), name="toy", version="1", vocab_size=10, eos_token_id=0, created_at="x",
                   shard_tokens=1000) as writer:
    writer.append("train", np.zeros(3500, int))
    writer.add_file("tokenizer.json", b"{}")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_nothing_to_see_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    folder = tmp_path / "sets" / "toy"
    died = subprocess.run([sys.executable, "-c", _WRITER, str(folder)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert not folder.exists()
    assert list(folder.parent.glob(".toy.tmp-*"))
    make(folder, np.arange(100))
    assert not list(folder.parent.glob(".toy.tmp-*"))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; skipped where mounting is not allowed."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("cannot mount a small tmpfs here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk(full_disk: Path) -> None:
    with pytest.raises(NoSpace, match="nothing was lost"):
        make(full_disk / "sets" / "toy", np.zeros(4_000_000, int), shard_tokens=1 << 20)
    assert [path.name for path in (full_disk / "sets").iterdir() if not path.name.endswith(".lock")] == []
    assert make(full_disk / "sets" / "toy", np.zeros(400_000, int), shard_tokens=1 << 20).num_tokens("train") == 400_000


def test_a_disk_without_room_for_the_stamp(full_disk: Path) -> None:
    dataset = make(full_disk / "toy", np.zeros(1000, int))
    (dataset.folder / ".verified.json").unlink()
    with (full_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)) == 4096 and os.statvfs(full_disk).f_bavail:
            pass
    assert TokenDataset.open(dataset.folder).verification == "hashed"


# ---- streams --------------------------------------------------------------------------------------------------------


def stream(dataset: TokenDataset, **changes: int) -> BatchStream:
    values = {"sequence_length": 9, "global_batch": 8, "seed": 5, **changes}
    return BatchStream(dataset, split="train", **values)


def test_a_batch_holds_inputs_and_targets(dataset: TokenDataset) -> None:
    batch = next(stream(dataset))
    assert batch.shape == (8, 10)
    assert batch.dtype == np.int64
    assert np.array_equal(np.diff(batch), np.ones((8, 9)))  # the tokens count up
    assert set(batch[:, 0] % 9) == {0}


def test_one_epoch_is_every_sample_once(dataset: TokenDataset) -> None:
    source = stream(dataset, global_batch=3)
    assert source.num_samples == 111
    seen = np.concatenate([next(source)[:, 0] for _ in range(37)])
    assert np.array_equal(np.sort(seen), np.arange(111) * 9)
    assert source.epoch == 1.0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]), before=st.integers(0, 30), seed=st.integers(0, 9), data=st.data()
)
def test_resumed_at_another_world_size_the_order_is_the_same(
    dataset: TokenDataset, world_size: int, before: int, seed: int, data: st.DataObject
) -> None:
    whole = stream(dataset, global_batch=12, seed=seed)
    expected = [next(whole) for _ in range(before + 5)]
    first = stream(dataset, global_batch=12, seed=seed, rank=0, world_size=data.draw(st.sampled_from([1, 2, 4])))
    for _ in range(before):
        next(first)
    ranks = [
        stream(dataset, global_batch=12, seed=seed, rank=rank, world_size=world_size, start_sample=first.next_sample)
        for rank in range(world_size)
    ]
    for step in range(before, before + 5):
        assert np.array_equal(np.concatenate([next(rank) for rank in ranks]), expected[step])


def test_another_batch_size_goes_on_where_the_first_stopped(dataset: TokenDataset) -> None:
    whole = stream(dataset, global_batch=1)
    expected = np.concatenate([next(whole) for _ in range(40)])
    small = stream(dataset, global_batch=4)
    parts = [next(small) for _ in range(4)]
    large = stream(dataset, global_batch=12, start_sample=small.next_sample)
    parts += [next(large) for _ in range(2)]
    assert np.array_equal(np.concatenate(parts), expected)


def test_the_state_can_be_set_back(dataset: TokenDataset) -> None:
    source = stream(dataset)
    first = [next(source) for _ in range(3)]
    source.next_sample = 0
    assert all(np.array_equal(next(source), batch) for batch in first)


def test_a_split_that_ends_early(dataset: TokenDataset) -> None:
    assert next(BatchStream(dataset, split="held_out", sequence_length=29, global_batch=2, seed=1)).shape == (2, 30)
    with pytest.raises(DatasetTooSmall, match=r"30 tokens.*31.*prepare more text"):
        BatchStream(dataset, split="held_out", sequence_length=30, global_batch=2, seed=1)


def test_an_empty_split(tmp_path: Path) -> None:
    dataset = make(tmp_path / "set", np.arange(100), held_out=0)
    assert dataset.num_tokens("held_out") == 0
    assert list(dataset.split("held_out").sequences(8, 4)) == []
    with pytest.raises(DatasetTooSmall):
        BatchStream(dataset, split="held_out", sequence_length=8, global_batch=1, seed=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sequence_length": 0},
        {"global_batch": 0},
        {"start_sample": -1},
        {"rank": 2, "world_size": 2},
        {"rank": -1},
        {"world_size": 3},
    ],
)
def test_a_wrong_stream_is_refused(dataset: TokenDataset, wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInput):
        stream(dataset, **wrong)


def test_an_unknown_split(dataset: TokenDataset) -> None:
    with pytest.raises(InvalidInput, match="train and held_out"):
        dataset.split("test")


def test_sequences_cover_the_split_once_in_order(dataset: TokenDataset) -> None:
    batches = list(dataset.split("train").sequences(9, 8))
    rows = np.concatenate(batches)
    assert np.array_equal(rows[:, 0], np.arange(111) * 9)
    assert [len(batch) for batch in batches] == [8] * 13 + [7]
