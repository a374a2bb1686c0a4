"""The request log: what is offered is written once, beside the path, and a full disk or buffer stops nobody."""

from __future__ import annotations

import random
import stat
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core.errors import InvalidInput, NoSpace
from sihe.data.lake.table import LakeTable
from sihe.serving.engine.types import ChatMessage, GenerationRequest
from sihe.serving.exchange import Running, Written
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.request_log import KEY_FILE, TABLE, LogEntry, RequestLog, read
from sihe.serving.gateway.traffic.retention import expired, remove_expired
from sihe.serving.gateway.traffic.types import LogPolicy

NOW = datetime(2026, 1, 2, tzinfo=UTC)
DONE = Outcome("finished", "stop", None, 3, 4, 0.1, 0.2, "an answer", (1, 2))


def entry(number: int = 0, *, text: bool = False, **request: object) -> LogEntry:
    asked = GenerationRequest(**({"prompt": f"prompt {number}"} | request))  # type: ignore[arg-type]
    time = NOW + timedelta(seconds=number)
    return LogEntry(time, f"r{number}", "chat", "stable", "tiny@1", "someone", asked, DONE, keeps_text=text)


def test_what_was_offered_is_there_after_the_end(tmp_path: Path) -> None:
    fates: list[tuple[str, int]] = []
    log = RequestLog(tmp_path / "lake", on_fate=lambda fate, number: fates.append((fate, number)))
    for number in range(50):
        log.offer(entry(number))
    log.close()
    rows = read(tmp_path / "lake", limit=None)
    assert [row.request_id for row in rows] == [f"r{number}" for number in reversed(range(50))]
    assert {fate for fate, _ in fates} == {"written"}
    assert sum(number for _, number in fates) == 50
    assert read(tmp_path / "lake", limit=3) == rows[:3]
    assert read(tmp_path / "lake", deployment="it's another") == []


def test_nothing_logged_is_nothing_read(tmp_path: Path) -> None:
    assert read(tmp_path / "lake") == []
    log = RequestLog(tmp_path / "lake")
    log.flush()
    log.close()
    assert read(tmp_path / "lake") == []


def test_texts_are_hashed_under_the_homes_own_key(tmp_path: Path) -> None:
    found = []
    for home in ("a", "b", "a"):
        log = RequestLog(tmp_path / home / "lake")
        log.offer(entry(1))
        log.close()
        found.append(read(tmp_path / home / "lake")[0])
    assert found[0].prompt_hash == found[2].prompt_hash != found[1].prompt_hash
    assert (found[0].prompt, found[0].answer, found[0].prompt_characters) == (None, None, 8)
    assert found[0].session not in ("someone", found[1].session)
    key = tmp_path / "a" / KEY_FILE
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("request_fields", "kind", "prompt"),
    [
        ({"prompt": "plain"}, "completion", "plain"),
        ({"prompt": (1, 2, 3)}, "completion", "[1, 2, 3]"),
        ({"prompt": None, "messages": (ChatMessage("user", "你好"),)}, "chat", '[{"role": "user", "content": "你好"}]'),
        ({"prompt": "half \ud83d of a pair"}, "completion", "half ? of a pair"),
    ],
)
def test_every_kind_of_prompt_is_written(
    tmp_path: Path, request_fields: dict[str, object], kind: str, prompt: str
) -> None:
    log = RequestLog(tmp_path / "lake")
    log.offer(entry(text=True, **request_fields))
    log.close()
    (row,) = read(tmp_path / "lake")
    assert (row.kind, row.prompt, row.answer) == (kind, prompt, "an answer")


def test_a_full_disk_drops_and_counts_and_what_comes_later_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fates: list[tuple[str, int]] = []
    log = RequestLog(tmp_path / "lake", on_fate=lambda fate, number: fates.append((fate, number)))

    def full(self: LakeTable, *_: object, **__: object) -> int:
        raise NoSpace(tmp_path)

    monkeypatch.setattr(LakeTable, "append", full)
    log.offer(entry(1))
    log.flush()
    assert fates == [("dropped", 1)]
    monkeypatch.undo()
    log.offer(entry(2))
    log.flush()
    assert fates == [("dropped", 1), ("written", 1)]
    log.close()
    assert [row.request_id for row in read(tmp_path / "lake")] == ["r2"]


def test_a_slow_disk_fills_the_buffer_and_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fates: list[tuple[str, int]] = []
    writing, go = threading.Event(), threading.Event()
    append = LakeTable.append

    def slow(self: LakeTable, *args: object, **fields: object) -> int:
        writing.set()
        assert go.wait(30)
        return append(self, *args, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(LakeTable, "append", slow)
    log = RequestLog(tmp_path / "lake", on_fate=lambda fate, n: fates.append((fate, n)), max_buffered=10, every_s=0.001)
    log.offer(entry(0))
    assert writing.wait(30)
    for number in range(1, 31):
        log.offer(entry(number))  # returns, though the disk does not
    assert fates == [("dropped", 1)] * 20
    go.set()
    log.close()
    assert len(read(tmp_path / "lake", limit=None)) == 11
    log.offer(entry(99))
    assert fates[-1] == ("dropped", 1)  # after the end


def test_long_texts_are_written_before_the_buffer_is_full(tmp_path: Path) -> None:
    fates: list[tuple[str, int]] = []
    written = threading.Event()

    def note(fate: str, number: int) -> None:
        fates.append((fate, number))
        written.set()

    log = RequestLog(tmp_path / "lake", on_fate=note, every_s=3600)
    for number in range(33):
        log.offer(entry(number, prompt="x" * 2**20))
    assert written.wait(30)
    log.close()
    assert ({fate for fate, _ in fates}, sum(number for _, number in fates)) == ({"written"}, 33)


def test_of_a_long_table_only_the_rows_that_are_shown_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RequestLog(tmp_path / "lake")
    for number in random.Random(3).sample(range(400), 400):
        log.offer(entry(number, text=True))
    log.close()
    reads: list[tuple[object, int]] = []
    read_table = LakeTable.read

    def heard(table: LakeTable, *args: object, **fields: object) -> object:
        found = read_table(table, *args, **fields)  # type: ignore[arg-type]
        reads.append((fields.get("columns"), found.num_rows))
        return found

    monkeypatch.setattr(LakeTable, "read", heard)
    rows = read(tmp_path / "lake", deployment="chat", limit=7)
    assert [row.request_id for row in rows] == [f"r{number}" for number in range(399, 392, -1)]
    assert reads == [(["time"], 400), (None, 7)]
    assert len(read(tmp_path / "lake", limit=1000)) == 400


# ---- how long records are kept ---------------------------------------------------------------------------------------


def aged(days: float, deployment: str) -> LogEntry:
    made = entry()
    return replace(made, time=NOW - timedelta(days=days), request_id=f"{deployment}-{days:g}", deployment=deployment)


def test_records_go_when_their_deployments_days_are_over(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "lake")
    for deployment in ("chat", "it's", "gone"):
        for days in (0.5, 6.999, 7.001, 29.999, 30.001, 400):
            log.offer(aged(days, deployment))
    log.flush()
    log.tidy({"chat": 7, "it's": 365}, NOW)
    log.flush()
    log.close()
    assert {row.request_id for row in read(tmp_path / "lake", limit=None)} == {
        *("chat-0.5", "chat-6.999"),
        *("it's-0.5", "it's-6.999", "it's-7.001", "it's-29.999", "it's-30.001"),
        *("gone-0.5", "gone-6.999", "gone-7.001", "gone-29.999"),  # nobody says how long: thirty days
    }


def test_a_look_an_hour_is_enough_and_what_it_finds_is_gone_for_good(tmp_path: Path) -> None:
    folder = tmp_path / "lake"
    log = RequestLog(folder)
    log.tidy({}, NOW)
    assert not folder.exists(), "nothing was ever logged"
    log = RequestLog(folder)
    log.offer(aged(29.99, "chat"))
    log.flush()
    log.tidy({}, NOW)
    log.flush()
    log.tidy({}, NOW + timedelta(minutes=59))  # by now its time is over
    log.flush()
    assert len(read(folder)) == 1
    log.tidy({}, NOW + timedelta(hours=1))
    log.flush()
    assert read(folder) == []
    assert remove_expired(folder, TABLE, {}, NOW, purge_after_h=0) is False
    log.close()
    assert list((folder / TABLE).glob("*.parquet")) == []


def test_no_text_outlives_its_record_in_the_tables_own_log(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "lake")
    for number in range(2):
        log.offer(entry(number, text=True))
        log.flush()
    log.close()
    quoted = "".join(path.read_text() for path in (tmp_path / "lake" / TABLE).glob("_delta_log/*.json"))
    assert "stable" in quoted
    assert "prompt 0" not in quoted
    assert "an answer" not in quoted


def test_a_disk_on_which_nothing_can_be_removed_stops_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: LakeTable, *_: object, **__: object) -> int:
        raise NoSpace(tmp_path)

    log = RequestLog(tmp_path / "lake")
    log.offer(aged(99, "chat"))
    log.flush()
    monkeypatch.setattr(LakeTable, "remove", full)
    log.tidy({}, NOW)
    log.flush()
    log.offer(entry(1))
    log.close()
    assert len(read(tmp_path / "lake")) == 2


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 50)), st.integers(1, 50))
def test_what_has_expired_is_what_each_deployment_says(keep_days: dict[str, int], otherwise: int) -> None:
    import sqlite3

    found = sqlite3.connect(":memory:")
    found.execute("create table records (deployment text, time text)")
    rows = [(name, age) for name in "abcde" for age in range(0, 60, 3)]
    moments = [(name, (NOW - timedelta(days=age)).isoformat(timespec="microseconds")) for name, age in rows]
    found.executemany("insert into records values (?, ?)", moments)
    where = expired(keep_days, NOW, otherwise=otherwise)
    gone = set(found.execute(f"select deployment, time from records where {where}"))
    assert gone == {
        moment for moment, (name, age) in zip(moments, rows, strict=True) if age > keep_days.get(name, otherwise)
    }
    found.close()


@pytest.mark.parametrize("days", [0, -1, 36_501, 1.5])
def test_days_are_whole_and_some(days: float) -> None:
    with pytest.raises(InvalidInput, match="keep_days"):
        LogPolicy(0.5, keep_days=days)  # type: ignore[arg-type]


def test_a_question_that_cannot_be_written_down_takes_no_other_record_with_it(tmp_path: Path) -> None:
    class Unspeakable:
        kind, tenant, size = "infer", "", 1

        def begin(self, served: object) -> Running:
            raise AssertionError("nobody asks")

        def written(self) -> Written:
            raise ArithmeticError("no words")

    fates: list[tuple[str, int]] = []
    log = RequestLog(tmp_path / "lake", on_fate=lambda fate, number: fates.append((fate, number)))
    log.offer(replace(entry(1), request=Unspeakable()))
    log.offer(entry(2))
    log.flush()
    log.close()
    assert [row.request_id for row in read(tmp_path / "lake")] == ["r2"]
    assert sorted(fates) == [("dropped", 1), ("written", 1)]
