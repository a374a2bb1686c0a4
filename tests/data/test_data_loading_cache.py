"""The cache of remote shards: fetched once, right or not at all, bounded, never pulled from under a reader."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from sihe.core.errors import ConfigError, CorruptData, NotFound, TooLarge, Unreachable
from sihe.data.loading import BatchStream, ShardCache, TokenDataset
from sihe.data.loading.cache import Lease, RemoteShard
from sihe.data.loading.remote import RemoteFolder
from support.token_sets import write_tokens


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[str]:
    """A URL in memory with a data set of sixteen shards, 250 tokens (500 bytes) each."""
    folder = write_tokens(tmp_path / "published", [np.arange(4000)], vocab_size=4000, shard_tokens=250)
    files = fsspec.filesystem("memory")
    url = f"memory://sets-{tmp_path.name}"
    for file in folder.glob("[!.]*"):
        files.pipe_file(f"{url}/{file.name}", file.read_bytes())
    yield url
    files.rm(url, recursive=True)


def batches(dataset: TokenDataset, count: int = 40) -> list[np.ndarray]:
    stream = BatchStream(dataset, split="train", sequence_length=19, global_batch=8, seed=3)
    return [next(stream) for _ in range(count)]


def shards(url: str, folder: Path) -> list[RemoteShard]:
    manifest = TokenDataset.open(folder).manifest
    return [RemoteShard(RemoteFolder(url), s.file, 2 * s.tokens, s.sha256) for s in manifest.splits["train"]]


def damage(url: str, name: str) -> bytes:
    """Flips a bit of a remote file; what it was before."""
    files = fsspec.filesystem("memory")
    before: bytes = files.cat_file(f"{url}/{name}")
    files.pipe_file(f"{url}/{name}", bytes([before[0] ^ 1]) + before[1:])
    return before


@pytest.mark.parametrize("limit_bytes", [1 << 20, 2000, 500])
def test_a_data_set_at_a_url_is_read_as_a_local_one(remote: str, tmp_path: Path, limit_bytes: int) -> None:
    """Also where the cache holds four of its shards, or one."""
    cache = ShardCache(tmp_path / "cache", limit_bytes=limit_bytes)
    far, near = TokenDataset.open(remote, cache=cache), TokenDataset.open(tmp_path / "published")
    assert far.manifest == near.manifest
    assert far.verification == "on use"
    assert (far.folder / "tokenizer.json").read_bytes() == b"{}"
    assert np.array_equal(batches(far, 10), batches(near, 10))
    assert cache.size_bytes <= limit_bytes


def test_shards_come_when_they_are_needed_and_once(remote: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit_bytes=1 << 20)
    dataset = TokenDataset.open(remote, cache=cache)
    assert cache.size_bytes == 0
    dataset.split("train").tokens(0, 10)
    assert cache.size_bytes == 500
    batches(dataset)
    fsspec.filesystem("memory").rm([f"{remote}/{s.file}" for s in dataset.manifest.splits["train"]])
    assert np.array_equal(batches(TokenDataset.open(remote, cache=cache)), batches(dataset))


def test_a_url_needs_a_cache(remote: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TokenDataset.open(remote)
    assert caught.value.key == "cache"


def test_what_is_not_there(remote: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit_bytes=1 << 20)
    with pytest.raises(NotFound, match=r"dataset\.json"):
        TokenDataset.open(f"{remote}/nothing", cache=cache)
    dataset = TokenDataset.open(remote, cache=cache)
    fsspec.filesystem("memory").rm(f"{remote}/train-00000.bin")
    with pytest.raises(NotFound, match=r"train-00000\.bin"):
        dataset.split("train").tokens(0, 10)


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_a_damaged_copy_is_fetched_again(remote: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit_bytes=1 << 20)
    shard = shards(remote, tmp_path / "published")[0]
    with cache.lease(shard) as lease:
        right = lease.path.read_bytes()
    for wrong in (right[:-1], bytes([right[0] ^ 1]) + right[1:]):
        lease.path.write_bytes(wrong)
        with cache.lease(shard) as lease:
            assert lease.path.read_bytes() == right


class Flaky(RemoteFolder):
    """A remote folder whose first `failures` transfers go wrong as `how` says."""

    def __init__(self, url: str, failures: int, how: str) -> None:
        super().__init__(url)
        self.failures, self.how, self.transfers = failures, how, 0

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        self.transfers += 1
        for piece in super().pieces(name, size):
            if self.transfers > self.failures:
                yield piece
            elif self.how == "unreachable":
                raise Unreachable(self.url, "played")
            else:
                yield {"short": piece[:-1], "flipped": bytes([piece[0] ^ 1]) + piece[1:], "long": piece + b"x"}[
                    self.how
                ]


@pytest.mark.parametrize(
    ("how", "error"),
    [("short", CorruptData), ("flipped", CorruptData), ("long", CorruptData), ("unreachable", Unreachable)],
)
def test_a_transfer_may_go_wrong_once(remote: str, tmp_path: Path, how: str, error: type[Exception]) -> None:
    cache = ShardCache(tmp_path / "cache", limit_bytes=1 << 20)
    one = shards(remote, tmp_path / "published")[0]
    once = RemoteShard(Flaky(remote, 1, how), one.name, one.size_bytes, one.sha256)
    twice = RemoteShard(Flaky(remote, 2, how), one.name, one.size_bytes, one.sha256)
    with pytest.raises(error):
        cache.lease(twice)
    assert cache.size_bytes == 0
    with cache.lease(once) as lease:
        assert hashlib.sha256(lease.path.read_bytes()).hexdigest() == one.sha256


def test_a_shard_that_is_corrupt_at_its_source(remote: str, tmp_path: Path) -> None:
    dataset = TokenDataset.open(remote, cache=ShardCache(tmp_path / "cache", limit_bytes=1 << 20))
    damage(remote, "train-00000.bin")
    with pytest.raises(CorruptData, match=r"train-00000\.bin.*SHA-256"):
        dataset.split("train").tokens(0, 10)


@pytest.mark.parametrize("name", ["dataset.json", "tokenizer.json"])
def test_a_damaged_small_file_leaves_nothing(remote: str, tmp_path: Path, name: str) -> None:
    cache = ShardCache(tmp_path / "cache", limit_bytes=1 << 20)
    before = damage(remote, name)
    with pytest.raises(CorruptData):
        TokenDataset.open(remote, cache=cache)
    fsspec.filesystem("memory").pipe_file(f"{remote}/{name}", before)
    assert np.array_equal(TokenDataset.open(remote, cache=cache).split("train").tokens(0, 3), [0, 1, 2])


def test_token_ids_that_the_vocabulary_does_not_have(remote: str, tmp_path: Path) -> None:
    manifest = replace(TokenDataset.open(tmp_path / "published").manifest, vocab_size=3999)
    fsspec.filesystem("memory").pipe_file(f"{remote}/dataset.json", manifest.to_json())
    split = TokenDataset.open(remote, cache=ShardCache(tmp_path / "cache", limit_bytes=1 << 20)).split("train")
    split.tokens(0, 10)
    with pytest.raises(CorruptData, match=r"train-00015\.bin.*token id 3,999"):
        split.tokens(3990, 3999)


_FETCHER = """
import os, signal, sys
from sihe.data.loading import ShardCache, TokenDataset
from sihe.data.loading import cache
transfer = cache._transfer
def killed(shard, part):
    with part.open("r+b") as file:
        file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
cache._transfer = killed
TokenDataset.open(sys.argv[1], cache=ShardCache(sys.argv[2], limit_bytes=1000)).split("train").tokens(0, 10)
"""


def test_what_a_killed_fetch_left_is_repaired(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "published", [np.arange(1000)], shard_tokens=250)
    died = subprocess.run([sys.executable, "-c", _FETCHER, f"file://{folder}", str(tmp_path / "cache")], check=False)
    assert died.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "cache" / "shards").glob("*.part"))) == 1
    cache = ShardCache(tmp_path / "cache", limit_bytes=1000)
    tokens = TokenDataset.open(f"file://{folder}", cache=cache).split("train")
    assert np.array_equal(tokens.tokens(700, 720), np.arange(700, 720))  # other shards: the leftover gives way
    assert np.array_equal(tokens.tokens(300, 320), np.arange(300, 320))
    assert not list((tmp_path / "cache" / "shards").glob("*.part"))
    assert np.array_equal(tokens.tokens(0, 20), np.arange(20))


# ---- room -----------------------------------------------------------------------------------------------------------


def test_the_shard_used_longest_ago_goes_and_none_in_use(remote: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit_bytes=1500)
    first, second, third, fourth, fifth = shards(remote, tmp_path / "published")[:5]
    used = cache.lease(first)
    for when, shard in enumerate((second, third)):
        with cache.lease(shard) as lease:
            os.utime(lease.path.with_suffix(".checked"), (1000 + when, 1000 + when))
    os.utime(used.path.with_suffix(".checked"), (1, 1))
    with cache.lease(fourth):
        kept = {path.name for path in (tmp_path / "cache" / "shards").glob("*") if not path.suffix}
        assert kept == {first.sha256, third.sha256, fourth.sha256}
        with cache.lease(fifth), pytest.raises(TooLarge, match="raise its limit"):
            cache.lease(second)
    used.close()
    with cache.lease(second):
        assert cache.size_bytes <= 1500


def test_a_shard_larger_than_the_cache(remote: str, tmp_path: Path) -> None:
    with pytest.raises(TooLarge) as caught:
        TokenDataset.open(remote, cache=ShardCache(tmp_path / "c", limit_bytes=499)).split("train").tokens(0, 1)
    assert (caught.value.limit, caught.value.actual) == (499, 500)
    with pytest.raises(TooLarge, match="each reader"):
        TokenDataset.open(remote, cache=ShardCache(tmp_path / "c", limit_bytes=999, readers=2)).split("train").tokens(
            0, 1
        )
    with pytest.raises(ConfigError):
        ShardCache(tmp_path / "c", limit_bytes=0)
    with pytest.raises(ConfigError):
        ShardCache(tmp_path / "c", limit_bytes=1, readers=0)


class CacheMachine(RuleBasedStateMachine):
    """Any order of leasing and giving back: the limit holds, leased shards stay and are right."""

    leases = Bundle("leases")

    def __init__(self, url: str, folder: Path, cache: Path) -> None:
        super().__init__()
        self.cache = ShardCache(cache, limit_bytes=2200)  # four shards
        self.shards = shards(url, folder)
        self.open: list[tuple[Lease, RemoteShard]] = []

    @rule(target=leases, number=st.integers(0, 15))
    def take(self, number: int) -> object:
        shard = self.shards[number]
        in_use = {other.sha256 for _, other in self.open} | {shard.sha256}
        if len(in_use) > 4:
            with pytest.raises(TooLarge):
                self.cache.lease(shard)
            return multiple()
        self.open.append((self.cache.lease(shard), shard))
        return self.open[-1]

    @rule(lease=leases)
    def give_back(self, lease: tuple[Lease, RemoteShard]) -> None:
        lease[0].close()
        self.open = [each for each in self.open if each is not lease]

    @invariant()
    def holds(self) -> None:
        assert self.cache.size_bytes <= 2200
        for lease, shard in self.open:
            assert hashlib.sha256(lease.path.read_bytes()).hexdigest() == shard.sha256

    def teardown(self) -> None:
        for lease, _ in self.open:
            lease.close()


def test_any_order_of_use(remote: str, tmp_path: Path) -> None:
    runs = iter(range(10_000))
    run_state_machine_as_test(
        lambda: CacheMachine(remote, tmp_path / "published", tmp_path / f"cache{next(runs)}"),
        settings=settings(max_examples=12, stateful_step_count=20, deadline=None),
    )


# ---- several processes ----------------------------------------------------------------------------------------------


def _read(url: str, cache: str, limit_bytes: int, results: multiprocessing.Queue[tuple[int, int]]) -> None:
    """Sends how many shards this process fetched, and the sum of what it read."""
    transfers = 0
    pieces = RemoteFolder.pieces

    def counted(self: RemoteFolder, name: str, size: int) -> Iterator[bytes]:
        nonlocal transfers
        transfers += name.endswith(".bin")
        return pieces(self, name, size)

    RemoteFolder.pieces = counted  # type: ignore[method-assign]  # this process is the test's own
    dataset = TokenDataset.open(url, cache=ShardCache(cache, limit_bytes=limit_bytes, readers=3))
    total = sum(int(batch.sum()) for batch in batches(dataset, 3))
    results.put((transfers, total))


@pytest.mark.parametrize(("shard_tokens", "limit_bytes"), [(400, 2400), (100, 1200)])
def test_ranks_share_a_cache(tmp_path: Path, shard_tokens: int, limit_bytes: int) -> None:
    """Three processes at once: three shards that all fit, then twelve of which six fit and the rest come again."""
    folder = write_tokens(tmp_path / "published", [np.arange(1200)], vocab_size=1200, shard_tokens=shard_tokens)
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[int, int]] = context.Queue()
    arguments = (f"file://{folder}", str(tmp_path / "cache"), limit_bytes, results)
    ranks = [context.Process(target=_read, args=arguments) for _ in range(3)]
    for rank in ranks:
        rank.start()
    transfers, totals = zip(*(results.get(timeout=90) for _ in ranks), strict=True)
    for rank in ranks:
        rank.join()
    assert set(totals) == {sum(int(batch.sum()) for batch in batches(TokenDataset.open(folder), 3))}
    assert sum(transfers) == 3 if limit_bytes == 2400 else sum(transfers) > 12
