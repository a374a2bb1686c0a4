"""Tables: versions, concurrent appends by real processes, appends that happen once, damage, a full disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from sihe.core.errors import CorruptData, InvalidInput, NoSpace, NotFound
from sihe.data.errors import SchemaMismatch
from sihe.data.lake import Lake, LakeTable


def rows(*numbers: int) -> pa.Table:
    return pa.table({"number": pa.array(numbers, pa.int64()), "text": [f"line {number}" for number in numbers]})


def numbers(table: LakeTable, version: int | None = None) -> list[int]:
    return sorted(table.read(version)["number"].to_pylist())


@pytest.fixture(params=["path", "file url"])
def lake(request: pytest.FixtureRequest, tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake" if request.param == "path" else f"file://{tmp_path}/lake")


def test_every_version_stays_readable(lake: Lake) -> None:
    table = lake.table("documents")
    assert [table.append(rows(1, 2)), table.append(rows(3)), table.append(rows())] == [0, 1, 2]
    assert numbers(table) == [1, 2, 3]
    assert numbers(table, 0) == [1, 2]
    assert table.version == 2
    assert [(commit.version, commit.rows_added) for commit in table.history()] == [(2, 0), (1, 1), (0, 2)]
    assert lake.names() == ["documents"]


def test_columns_types_and_predicates(lake: Lake) -> None:
    table = lake.table("documents")
    table.append(rows(*range(10)))
    found = table.read(columns=["text"], where="number = 7")
    assert found.equals(pa.table({"text": ["line 7"]}))
    assert table.read().schema.equals(rows(1).schema)
    with pytest.raises(NotFound, match=r"no column named 'size'.*number, text"):
        table.read(columns=["size"])


@pytest.mark.parametrize("where", ["number =", "size = 3", "nonsense(number)"])
def test_a_wrong_predicate_is_the_callers(lake: Lake, where: str) -> None:
    table = lake.table("documents")
    table.append(rows(1))
    with pytest.raises(InvalidInput, match="predicate"):
        table.read(where=where)


def test_rows_that_fit_after_conversion(lake: Lake) -> None:
    table = lake.table("documents")
    table.append(rows(1))
    table.append(pa.table({"text": pa.array(["x"], pa.large_string()), "number": pa.array([2], pa.int8())}))
    assert numbers(table) == [1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        pa.table({"number": [1]}),
        pa.table({"number": [1], "text": ["a"], "more": [1]}),
        pa.table({"number": ["x"], "text": ["a"]}),
        pa.table({"number": [1.5], "text": ["a"]}),
        pa.table({"number": [[1]], "text": ["a"]}),
    ],
)
def test_rows_that_do_not_fit_change_nothing(lake: Lake, wrong: pa.Table) -> None:
    table = lake.table("documents")
    table.append(rows(1))
    with pytest.raises(SchemaMismatch, match="documents"):
        table.append(wrong)
    assert table.version == 0


@pytest.mark.parametrize("version", [2, 77, -1])
def test_a_version_that_is_not_there(lake: Lake, version: int) -> None:
    table = lake.table("documents")
    table.append(rows(1))
    table.append(rows(2))
    with pytest.raises(NotFound, match=f"'{version}'.*versions 0 to 1"):
        table.read(version)


def test_a_table_that_is_not_there(lake: Lake) -> None:
    assert lake.names() == []
    assert not lake.table("nothing").exists()
    with pytest.raises(NotFound, match="nothing was appended"):
        lake.table("nothing").read()
    lake.table("documents").append(rows(1))
    with pytest.raises(NotFound, match="has: documents"):
        lake.existing("nothing")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden"])
def test_names_that_leave_the_lake(lake: Lake, name: str) -> None:
    with pytest.raises(InvalidInput, match="table name"):
        lake.table(name)


def test_an_append_with_a_key_happens_once(lake: Lake) -> None:
    table = lake.table("documents")
    assert table.version_of("snapshot") is None
    assert table.append(rows(1), key="first") == 0
    assert table.append(rows(2), key="snapshot") == 1
    assert table.append(rows(3)) == 2
    assert table.append(rows(2), key="snapshot") == 1
    assert table.version_of("snapshot") == 1
    assert numbers(table) == [1, 2, 3]


# ---- several processes ----------------------------------------------------------------------------------------------


Appended = dict[int, int]  # number → the version that its append returned


def _append(folder: Path, worker: int, count: int, key: str | None, results: multiprocessing.Queue[Appended]) -> None:
    table = Lake(folder).table("documents")
    results.put({worker * 1000 + i: table.append(rows(worker * 1000 + i), key=key) for i in range(count)})


def _together(folder: Path, workers: int, count: int, key: str | None = None) -> Appended:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Appended] = context.Queue()
    processes = [
        context.Process(target=_append, args=(folder, worker, count, key, results)) for worker in range(workers)
    ]
    for process in processes:
        process.start()
    appended = {number: version for _ in processes for number, version in results.get(timeout=120).items()}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return appended


def test_concurrent_appends_are_all_kept_from_the_first_on(tmp_path: Path) -> None:
    appended = _together(tmp_path / "lake", workers=3, count=8)
    table = Lake(tmp_path / "lake").table("documents")
    assert sorted(appended.values()) == list(range(24))
    assert numbers(table) == sorted(worker * 1000 + number for worker in range(3) for number in range(8))
    for number, version in appended.items():
        assert number in numbers(table, version)
        assert version == 0 or number not in numbers(table, version - 1)


def test_concurrent_appends_of_one_key_are_one(tmp_path: Path) -> None:
    appended = _together(tmp_path / "lake", workers=3, count=2, key="same")
    assert set(appended.values()) == {0}
    assert len(numbers(Lake(tmp_path / "lake").table("documents"))) == 1


_WRITER = """
import sys
import pyarrow as pa
from sihe.data.lake import Lake
table = Lake(sys.argv[1]).table("documents")
while True:
    table.append(pa.table({"number": list(range(50)), "text": ["x" * 1000] * 50}))
    print(table.version, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_appends(tmp_path: Path) -> None:
    table = Lake(tmp_path / "lake").table("documents")
    for after in (1, 3, 6):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path / "lake")], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(after):
            acknowledged = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert table.version >= acknowledged
        assert len(numbers(table)) == 50 * (table.version + 1)
    assert table.append(rows(1)) == table.version


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> LakeTable:
    table = Lake(tmp_path / "lake").table("documents")
    for number in range(3):
        table.append(rows(number))
    return table


def test_a_log_entry_cut_short(damaged: LakeTable) -> None:
    entry = Path(damaged.url) / "_delta_log" / f"{1:020d}.json"
    entry.write_bytes(entry.read_bytes()[:100])
    with pytest.raises(CorruptData, match="documents"):
        damaged.read()


def test_a_log_entry_that_is_missing(damaged: LakeTable) -> None:
    (Path(damaged.url) / "_delta_log" / f"{1:020d}.json").unlink()
    with pytest.raises(CorruptData):
        damaged.read()
    with pytest.raises(CorruptData):
        damaged.append(rows(9))


@pytest.mark.parametrize("damage", ["cut", "overwritten", "missing"])
def test_a_damaged_data_file(damaged: LakeTable, damage: str) -> None:
    file = sorted(Path(damaged.url).glob("*.parquet"))[1]
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-20] if damage == "cut" else data[:20] + b"\x99" * 60 + data[80:])
    with pytest.raises(CorruptData, match="restore the file"):
        damaged.read()


def test_what_is_removed_is_gone_from_the_disk_after_the_purge(lake: Lake) -> None:
    table = lake.table("documents")
    for number in range(4):
        table.append(rows(number))
    folder = Path(table.url)
    assert table.remove("number < 2") == 4
    assert numbers(table) == [2, 3]
    assert numbers(table, 3) == [0, 1, 2, 3]
    assert table.purge() == 0, "who reads an older version at this moment is not disturbed"
    assert table.purge(older_than_h=0) == 2
    assert len(list(folder.glob("*.parquet"))) == 2
    assert numbers(table) == [2, 3]
    with pytest.raises(CorruptData):
        table.read(3)
    version = table.version
    assert table.remove("number < 2") is None
    assert table.purge(older_than_h=0) == 0
    assert table.version == version, "nothing to do is no version"
    table.append(rows(7))
    assert numbers(table) == [2, 3, 7]


def test_rows_are_removed_from_files_that_keep_others(lake: Lake) -> None:
    table = lake.table("documents")
    table.append(rows(1, 2, 3))
    table.remove("text = 'line 2'")
    assert numbers(table) == [1, 3]
    with pytest.raises(InvalidInput, match="predicate"):
        table.remove("number =")


def test_what_a_killed_writer_left_is_purged_and_what_one_writes_now_is_not(lake: Lake) -> None:
    table = lake.table("documents")
    table.append(rows(1))
    now, old = (Path(table.url) / f"{name}.parquet" for name in ("now", "old"))
    now.write_bytes(b"not committed yet")
    old.write_bytes(b"never committed")
    os.utime(old, (1, 1))
    assert table.purge() == 1
    assert (now.exists(), old.exists()) == (True, False)
    assert numbers(table) == [1]


def test_properties_are_the_first_appends(lake: Lake) -> None:
    """Without them the log, which no removal reaches, quotes the rows: smallest and largest values of each column."""
    quoted, silent = lake.table("quoted"), lake.table("silent")
    quoted.append(rows(1))
    for _ in range(2):
        silent.append(rows(1), properties={"delta.dataSkippingStatsColumns": "number"})
    for table, quotes in ((quoted, True), (silent, False)):
        log = "".join(path.read_text() for path in Path(table.url).glob("_delta_log/*.json"))
        assert ("line 1" in log) == quotes
        assert "36500 days" in log


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("cannot mount a small tmpfs here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_keeps_what_was_there(small_disk: Path) -> None:
    table = Lake(small_disk / "lake").table("documents")
    table.append(pa.table({"data": [b"small"]}))
    with pytest.raises(NoSpace, match="nothing was lost"):
        table.append(pa.table({"data": [os.urandom(4_000_000)]}))
    assert table.version == 0
    assert table.read()["data"].to_pylist() == [b"small"]
    assert table.append(pa.table({"data": [b"again"]})) == 1
