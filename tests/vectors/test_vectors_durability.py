"""Durability with real processes, a real full disk and real damage."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from sihe.core.errors import Busy, CorruptData, NoSpace
from sihe.vectors.collection import Collection
from sihe.vectors.database import Database
from sihe.vectors.errors import WriterBusy

# Writes rounds of the same 40 ids, so that replacing, deleting, flushing and merging all go on when it is killed.
WRITER = """
import sys
from pathlib import Path
from sihe.vectors.collection import Collection
collection = Collection(Path(sys.argv[1]), flush_bytes=3000, max_segments=3)
for n in range(int(sys.argv[2]), 10**9):
    if n % 7 == 3:
        collection.delete([n % 40])
        print("deleted", n, flush=True)
    else:
        collection.upsert([n % 40, f"n{n}"], [[n + 1, 1], [1, n + 1]], [{"n": n}, {"n": n}])
        print("written", n, flush=True)
"""


def start(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_every_acknowledged_write_survives_kill_9(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    Database(tmp_path).create("c", 2)
    moments = random.Random(7)
    newest: dict[int, int | None] = {}  # id → number of the acknowledged write it must show, None when deleted
    written: set[int] = set()
    begin, in_flight = 0, -1
    for _ in range(6):
        stop_after = moments.randint(5, 120)
        lines = []
        with start(WRITER, folder, begin) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if len(lines) == stop_after:
                    process.send_signal(signal.SIGKILL)
            assert process.stderr is not None
            complaints = process.stderr.read()
        assert process.returncode == -signal.SIGKILL, complaints
        for line in lines:
            verb, number = line.split()
            n = int(number)
            newest[n % 40] = n if verb == "written" else None
            written |= {n} if verb == "written" else set()
        in_flight = int(lines[-1].split()[1]) + 1  # may or may not have happened: nobody was told
        collection = Collection(folder)
        if collection.get([f"n{in_flight}"]):
            newest[in_flight % 40] = in_flight
            written.add(in_flight)
        elif in_flight % 7 == 3 and not collection.get([in_flight % 40]):
            newest[in_flight % 40] = None
        for id, n in newest.items():
            assert [point.payload for point in collection.get([id])] == ([] if n is None else [{"n": n}])
        assert {p.payload["n"] for p in collection.get([f"n{n}" for n in sorted(written)])} == written
        assert collection.count() == len(written) + sum(n is not None for n in newest.values())
        begin = in_flight + 1


def test_one_process_writes_and_others_read(tmp_path: Path) -> None:
    Database(tmp_path).create("c", 2)
    with start(WRITER, tmp_path / "c", 0) as process:
        assert process.stdout is not None
        collection = Collection(tmp_path / "c")
        for line in process.stdout:  # while it flushes and merges under the reader's feet
            verb, number = line.split()
            if verb == "written":
                assert collection.get([f"n{number}"])[0].payload == {"n": int(number)}
            if int(number) == 60:
                break
        with pytest.raises(WriterBusy, match="another process is writing to the collection 'c'"):
            collection.upsert([1], [[1, 1]])
        with pytest.raises(Busy):
            Database(tmp_path).drop("c")
        process.kill()
    assert collection.upsert(["mine"], [[1, 1]]) == 1  # the system freed the dead writer's lock


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk needs the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("flush_bytes", [1 << 30, 100_000])
def test_a_full_disk_is_said_and_loses_nothing(small_disk: Path, flush_bytes: int) -> None:
    Database(small_disk).create("c", 64)
    collection = Collection(small_disk / "c", flush_bytes=flush_bytes)
    stored = 0
    with suppress(NoSpace):
        while True:
            collection.upsert(range(stored, stored + 20), np.ones((20, 64)), [{"n": stored}] * 20)
            stored += 20
    assert stored >= 1000
    for _ in range(3):
        with pytest.raises(NoSpace, match="nothing was lost"):
            collection.upsert(range(10**6, 10**6 + 500), np.ones((500, 64)))
        assert {point.id for point in collection.scroll(10**6).points} == set(range(stored))
        collection.close()


def test_a_full_disk_refuses_a_flush_and_leaves_everything_readable(small_disk: Path) -> None:
    collection = Database(small_disk).create("c", 64)
    collection.upsert(
        range(1500), np.ones((1500, 64))
    )  # 384 kB in the log: there is no room for a segment and its copy
    (small_disk / "ballast").write_bytes(bytes(400_000))
    for step in (collection.flush, collection.compact):
        with pytest.raises(NoSpace):
            step()
        assert collection.count() == 1500
    (small_disk / "ballast").unlink()
    collection.flush()
    collection.close()
    assert collection.count() == 1500
    assert collection.info().segments == 1


def _stored(tmp_path: Path) -> Path:
    collection = Database(tmp_path).create("c", 8)
    collection.upsert(range(100), np.arange(1, 801).reshape(100, 8), [{"n": n} for n in range(100)])
    collection.flush()
    collection.upsert(range(100, 120), np.ones((20, 8)))
    collection.upsert(range(120, 140), np.ones((20, 8)))
    collection.close()
    return tmp_path / "c"


@pytest.mark.parametrize(
    "name", ["vectors.npy", "norms.npy", "ids.json", "deleted.json", "payloads.bin", "payloads.npy"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_segment_is_named(tmp_path: Path, name: str, damage: str) -> None:
    (file,) = _stored(tmp_path).glob(f"segment-*/{name}")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-1])
    collection = Database(tmp_path).collection("c")
    with pytest.raises(CorruptData, match=f"{name} is corrupt"):
        collection.search(np.ones(8))
    with pytest.raises(CorruptData, match="nothing in it was changed"):
        collection.upsert([1], np.ones((1, 8)))  # a writer must not build on damage either


def test_a_damaged_description_of_a_segment_is_named(tmp_path: Path) -> None:
    (file,) = _stored(tmp_path).glob("segment-*/segment.json")
    for content in ("{", "[]", '{"format": 2}', file.read_text().replace('"rows": 100', '"rows": 99')):
        file.write_text(content)
        with pytest.raises(CorruptData, match="segment-"):
            Database(tmp_path).collection("c").count()


def test_a_damaged_log_is_refused_and_a_torn_one_is_not(tmp_path: Path) -> None:
    folder = _stored(tmp_path)
    (log,) = folder.glob("log-*")
    data = log.read_bytes()
    log.write_bytes(data[:-3])
    collection = Collection(folder)
    assert collection.count() == 120
    damaged = bytearray(data)
    damaged[60] ^= 1
    log.write_bytes(damaged)
    with pytest.raises(CorruptData, match="log-"):
        Collection(folder).count()
    log.unlink()
    with pytest.raises(CorruptData, match="missing"):
        Collection(folder).count()
