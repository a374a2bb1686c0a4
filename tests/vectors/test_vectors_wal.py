"""The log under truncation and flipped bits at random places: what it gives back was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.core.errors import CorruptData, InternalError, NoSpace, TooLarge
from sihe.vectors import wal
from sihe.vectors.wal import LogWriter, encode_frame, read_frames

BODIES = st.lists(st.binary(min_size=1, max_size=1500), min_size=1, max_size=6)
PATH = Path("log")


def read(data: bytes) -> list[bytes]:
    return [frame.body for frame in read_frames(data, PATH, sequence=0)]


def log_of(bodies: list[bytes]) -> bytes:
    return b"".join(encode_frame(number, body) for number, body in enumerate(bodies, 1))


@given(bodies=BODIES)
@settings(deadline=None)
def test_what_was_written_is_read(bodies: list[bytes]) -> None:
    assert read(log_of(bodies)) == bodies


@given(bodies=BODIES, share=st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_a_log_cut_anywhere_gives_the_whole_frames_before_the_cut(bodies: list[bytes], share: float) -> None:
    data = log_of(bodies)
    cut = data[: int(share * len(data))]
    expected, size = [], 0
    for number, body in enumerate(bodies, 1):
        size += len(encode_frame(number, body))
        if size <= len(cut):
            expected.append(body)
    assert read(cut) == expected


@given(bodies=BODIES, data=st.data())
@settings(max_examples=500, deadline=None)
def test_a_flipped_bit_is_never_read_as_data(bodies: list[bytes], data: st.DataObject) -> None:
    # Bodies without zero bytes: whole sectors of zeros are what a crash leaves, and the test below is about them.
    log = bytearray(log_of([body.replace(b"\0", b"\1") for body in bodies]))
    bit = data.draw(st.integers(0, len(log) * 8 - 1))
    log[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(CorruptData, match="wrong checksum"):
        read(bytes(log))


@given(bodies=BODIES, garbage=st.binary(min_size=24, max_size=600).filter(lambda found: found[:1] != b"\0"))
@settings(deadline=None)
def test_foreign_bytes_at_the_end_are_refused(bodies: list[bytes], garbage: bytes) -> None:
    if b"\0" * 20 in garbage:
        return
    with pytest.raises(CorruptData):
        read(log_of(bodies) + garbage)


@given(bodies=BODIES, data=st.data())
@settings(deadline=None)
def test_sectors_of_the_last_frame_that_never_reached_the_disk_are_an_incomplete_tail(
    bodies: list[bytes], data: st.DataObject
) -> None:
    *former, last = [*bodies, b"x" * 2000]
    start = len(log_of(former))
    log = bytearray(log_of([*former, last]))
    first_sector = -(-start // 512) * 512
    hole = data.draw(st.integers(0, (len(log) - first_sector) // 512 - 1)) * 512 + first_sector
    log[hole : hole + 512] = bytes(512)
    assert read(bytes(log)) == former
    assert read(log_of(former) + bytes(4096)) == former  # the size grew, and none of the content arrived


def test_a_frame_missing_in_the_middle_is_noticed() -> None:
    frames = [encode_frame(number, b"body") for number in (1, 2, 3)]
    with pytest.raises(CorruptData, match="number 3, expected 2"):
        read(frames[0] + frames[2])


def test_a_writer_cuts_the_incomplete_tail_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    whole = encode_frame(1, b"one")
    path.write_bytes(whole + encode_frame(2, b"lost")[:-1])
    writer = LogWriter(path, len(whole), 1)
    writer.append(b"two")
    writer.close()
    assert read(path.read_bytes()) == [b"one", b"two"]


def test_a_failed_write_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    writer = LogWriter(path, 0, 0)
    writer.append(b"one")
    before = path.read_bytes()
    real, calls = wal.os.fsync, []

    def fails_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(wal.os, "fsync", fails_once)
    with pytest.raises(NoSpace):
        writer.append(b"two")
    assert path.read_bytes() == before
    assert not writer.is_broken
    writer.append(b"three")
    assert read(path.read_bytes()) == [b"one", b"three"]


def test_a_log_that_cannot_be_repaired_takes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogWriter(tmp_path / "log", 0, 0)

    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(wal.os, "fsync", fails)
        with pytest.raises(OSError, match="Input/output"):
            writer.append(b"one")
    assert writer.is_broken
    with pytest.raises(InternalError, match="close and open"):
        writer.append(b"two")


def test_a_frame_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal, "MAX_BODY", 10)
    with pytest.raises(TooLarge, match="split"):
        encode_frame(1, b"x" * 11)
