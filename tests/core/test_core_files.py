"""Atomic files and folders: under errors, under SIGKILL, and on a disk that is really full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sihe.core.errors import AlreadyExists, Busy, NoSpace
from sihe.core.files import exclusive, new_directory, sha256_of, write_file


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]


def test_a_full_disk_keeps_the_former_content(tiny_disk: Path) -> None:
    path = tiny_disk / "file"
    write_file(path, b"kept")
    with pytest.raises(NoSpace, match="no space left"):
        write_file(path, b"x" * 1_000_000)
    assert path.read_bytes() == b"kept"
    assert sorted(os.listdir(tiny_disk)) == ["file"]


def test_a_full_disk_leaves_no_half_folder(tiny_disk: Path) -> None:
    with pytest.raises(NoSpace), new_directory(tiny_disk / "folder") as staging:
        (staging / "a").write_bytes(b"x" * 1_000_000)
    assert not (tiny_disk / "folder").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(RuntimeError), new_directory(target) as staging:
        (staging / "a").write_text("a")
        raise RuntimeError
    assert not target.exists()
    with new_directory(target) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "a").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "a"
    with pytest.raises(AlreadyExists), new_directory(target):
        pass


KILLED = """
import sys, time
from pathlib import Path
from sihe.core.files import new_directory
with new_directory(Path(sys.argv[1])) as staging:
    (staging / "a").write_text("a")
    print("inside", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "inside\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    assert not target.exists()
    with new_directory(target) as staging:
        (staging / "b").write_text("b")
    assert os.listdir(target) == ["b"]
    assert [name for name in os.listdir(tmp_path) if ".tmp-" in name] == []


def test_a_lock_is_freed_when_its_holder_dies_and_busy_until_then(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom sihe.core.files import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Busy), exclusive(lock, timeout_s=0.05):
        pass
    holder.kill()
    holder.communicate()
    with exclusive(lock, timeout_s=5):
        pass


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
