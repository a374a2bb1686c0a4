"""One conformance suite for the object store, over a local folder and memory; S3 where a server can be had."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core.errors import ConfigError, InvalidInput, NotFound
from sihe.core.storage import ObjectStore


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return ObjectStore(f"file://{tmp_path}/objects" if request.param == "file" else f"memory://{tmp_path.name}")


def test_put_get_list_delete(store: ObjectStore) -> None:
    url = store.put("a/b/c", b"1")
    store.put("a/d", b"2")
    store.put("a/d", b"3")
    assert store.get("a/b/c") == b"1"
    assert store.get("a/d") == b"3"
    assert store.name_of(url) == "a/b/c"
    assert store.list() == ["a/b/c", "a/d"]
    assert store.list("a/b") == ["a/b/c"]
    assert store.list("none") == []
    assert store.exists("a")
    assert store.exists("a/d")
    store.delete("a/d")
    store.delete("a/d")
    assert not store.exists("a/d")
    with pytest.raises(NotFound):
        store.get("a/d")


def test_trees_come_back_equal(store: ObjectStore, tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    (folder / "sub").mkdir(parents=True)
    (folder / "one").write_bytes(b"1")
    (folder / "sub" / "two").write_bytes(b"2" * 1000)
    store.put_tree("trees/x", folder)
    back = store.get_tree("trees/x", tmp_path / "cache")
    assert (back / "one").read_bytes() == b"1"
    assert (back / "sub" / "two").read_bytes() == b"2" * 1000
    with pytest.raises(NotFound):
        store.get_tree("trees/none", tmp_path / "cache2")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x"])
def test_names_cannot_leave_the_store(store: ObjectStore, name: str) -> None:
    for call in (lambda: store.put(name, b""), lambda: store.get(name), lambda: store.delete(name)):
        with pytest.raises(InvalidInput):
            call()


def test_a_foreign_url_is_refused(store: ObjectStore) -> None:
    with pytest.raises(InvalidInput, match=r"objects\.url"):
        store.name_of("file:///elsewhere/x")


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objects\.url"):
        ObjectStore("gopher://x/y")


@given(data=st.binary(max_size=2000))
def test_any_bytes_survive(data: bytes) -> None:
    store = ObjectStore("memory://any")
    store.put("x", data)
    assert store.get("x") == data
