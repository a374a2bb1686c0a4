"""The collection against a dictionary and brute force in float64, through reopening, flushing and compaction."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sihe.core.errors import AlreadyExists, InvalidInput, NotFound
from sihe.vectors.collection import Collection
from sihe.vectors.database import Database
from sihe.vectors.errors import InvalidPayload, InvalidVector
from sihe.vectors.filter import matches, parse_filter
from sihe.vectors.manifest import Manifest
from sihe.vectors.types import Metric, PointId, id_order

DIM = 4
IDS = st.one_of(st.integers(0, 8), st.sampled_from(["0", "a", "b", "日本", "long" * 20]))
VECTORS = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=DIM, max_size=DIM).filter(any)
PAYLOADS = st.fixed_dictionaries(
    {}, optional={"n": st.integers(0, 3), "tags": st.lists(st.sampled_from("xyz")), "t": st.text(max_size=3)}
)
FILTERS = st.sampled_from(
    [
        None,
        {"field": "n", "equals": 1},
        {"or": [{"field": "n", "range": {"gte": 2}}, {"field": "tags", "in": ["x", "y"]}]},
        {"not": {"field": "tags", "equals": "z"}},
    ]
)


def oracle_closeness(metric: Metric, vector: np.ndarray, query: np.ndarray) -> float:
    x, q = vector.astype(np.float64), query.astype(np.float64)
    if metric == "dot":
        return float(x @ q)
    if metric == "l2":
        return -float(np.sqrt(((x - q) ** 2).sum()))
    return float(x @ q / np.sqrt((x @ x) * (q @ q)))


class CollectionMachine(RuleBasedStateMachine):
    """Any row of writes, reopenings, flushes and compactions leaves what a dictionary would hold."""

    @initialize(metric=st.sampled_from(["cosine", "dot", "l2"]), flush_bytes=st.sampled_from([1, 600, 1 << 20]))
    def create(self, metric: Metric, flush_bytes: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.metric, self.flush_bytes = metric, flush_bytes
        Database(self.folder).create("c", DIM, metric)
        self.collection = self.open()
        self.reader = self.open()  # another process would see the same files
        self.expected: dict[PointId, tuple[np.ndarray, dict[str, Any]]] = {}

    def open(self) -> Collection:
        return Collection(self.folder / "c", flush_bytes=self.flush_bytes, max_segments=3)

    @rule(points=st.dictionaries(IDS, st.tuples(VECTORS, PAYLOADS), max_size=5))
    def upsert(self, points: dict[PointId, tuple[list[float], dict[str, Any]]]) -> None:
        new = len(set(points) - set(self.expected))
        vectors = [vector for vector, _ in points.values()]
        assert self.collection.upsert(list(points), vectors, [payload for _, payload in points.values()]) == new
        self.expected |= {id: (np.array(vector, np.float32), payload) for id, (vector, payload) in points.items()}

    @rule(ids=st.lists(IDS, max_size=4))
    def delete(self, ids: list[PointId]) -> None:
        there = {id for id in ids if self.expected.pop(id, None) is not None}
        assert self.collection.delete(ids) == len(there)

    @rule()
    def flush(self) -> None:
        self.collection.flush()

    @rule()
    def compact(self) -> None:
        self.collection.compact()
        assert self.collection.info().segments == (1 if self.expected else 0)

    @rule()
    def reopen(self) -> None:
        self.collection.close()
        self.collection = self.open()

    @rule(query=VECTORS, k=st.integers(1, 6), condition=FILTERS, which=st.sampled_from(["collection", "reader"]))
    def search(self, query: list[float], k: int, condition: dict[str, Any] | None, which: str) -> None:
        hits = getattr(self, which).search(query, k, condition)
        parsed = condition and parse_filter(condition)
        wanted = {
            id: oracle_closeness(self.metric, vector, np.array(query))
            for id, (vector, payload) in self.expected.items()
            if parsed is None or matches(parsed, payload)
        }
        best = sorted(wanted.values(), reverse=True)[:k]
        sign = -1 if self.metric == "l2" else 1
        assert [sign * hit.score for hit in hits] == pytest.approx(best, abs=1e-5)
        assert [wanted[hit.id] for hit in hits] == pytest.approx(best, abs=1e-5)
        assert len({hit.id for hit in hits}) == len(hits)
        assert all(hit.payload == self.expected[hit.id][1] for hit in hits)

    @rule(limit=st.integers(1, 4), condition=FILTERS)
    def scroll(self, limit: int, condition: dict[str, Any] | None) -> None:
        parsed = condition and parse_filter(condition)
        wanted = [id for id, (_, p) in self.expected.items() if parsed is None or matches(parsed, p)]
        seen: list[PointId] = []
        page = self.collection.scroll(limit, filter=condition)
        while page.next is not None:
            assert len(page.points) == limit
            seen += [point.id for point in page.points]
            page = self.collection.scroll(limit, page.next, condition)
        seen += [point.id for point in page.points]
        assert seen == sorted(wanted, key=id_order)
        assert self.collection.count(condition) == len(wanted)

    @precondition(lambda self: hasattr(self, "collection"))
    @invariant()
    def everything_is_there(self) -> None:
        for reader in (self.collection, self.reader):
            points = reader.get(list(self.expected))
            assert [point.id for point in points] == list(self.expected)
            for point in points:
                vector, payload = self.expected[point.id]
                assert np.array_equal(point.vector, vector)
                assert point.payload == payload
            assert reader.count() == len(self.expected)

    def teardown(self) -> None:
        if hasattr(self, "collection"):
            self.collection.close()
            shutil.rmtree(self.folder)


TestCollectionMachine = CollectionMachine.TestCase
TestCollectionMachine.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "db")


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_search_equals_brute_force_at_real_size(database: Database, metric: Metric) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(3000, 96)).astype(np.float32) + 3.0  # away from zero: where l2 loses digits
    collection = database.create("c", 96, metric)
    collection.upsert(range(2000), vectors[:2000])
    collection.flush()
    collection.upsert(range(2000, 3000), vectors[2000:])
    for query in random.normal(size=(20, 96)) + 3.0:
        closeness = np.array([oracle_closeness(metric, vector, query.astype(np.float32)) for vector in vectors])
        expected = np.argsort(-closeness)[:10]
        assert [hit.id for hit in collection.search(query, 10)] == expected.tolist()


def test_equal_scores_come_in_the_order_of_ids(database: Database) -> None:
    collection = database.create("c", 2)
    collection.upsert(["b", 7, "a", 10, 2], [[1, 0]] * 5)
    collection.upsert([1], [[0, 1]])
    assert [hit.id for hit in collection.search([1, 0], 3)] == [2, 7, 10]
    assert [hit.id for hit in collection.search([1, 0], 6)] == [2, 7, 10, "a", "b", 1]


def test_a_view_does_not_change_while_a_writer_goes_on(database: Database) -> None:
    collection = database.create("c", 2, "l2")
    collection.upsert(range(100), [[i, 0] for i in range(100)], [{"v": 1}] * 100)
    view = collection._read()
    query = np.zeros(2, np.float32)
    before = view.search(query, 100, None)
    collection.upsert(range(50, 300), [[0, i] for i in range(250)], [{"v": 2}] * 250)  # replaces, adds, grows arrays
    collection.delete(range(25))
    collection.flush()
    collection.delete(range(25, 75))
    collection.compact()
    assert view.search(query, 100, None) == before
    assert [point.payload for point in view.scroll(100, None, None).points] == [{"v": 1}] * 100
    assert collection.count() == 225


def test_readers_see_each_batch_whole_or_not_at_all(database: Database) -> None:
    collection = database.create("c", 2, "dot")
    collection.upsert(range(64), [[1, 1]] * 64, [{"v": 0}] * 64)
    stop = threading.Event()
    mixed: list[set[int]] = []

    def read() -> None:
        while not stop.is_set():
            versions = {hit.payload["v"] for hit in collection.search([1, 1], 64)}
            if len(versions) != 1:
                mixed.append(versions)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for version in range(1, 40):
        collection.upsert(range(64), [[1, 1]] * 64, [{"v": version}] * 64)
        if version % 10 == 0:
            collection.flush()
        if version % 15 == 0:
            collection.compact()
    stop.set()
    for thread in threads:
        thread.join()
    assert mixed == []


def test_threads_that_write_at_once_share_syncs_and_lose_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = database.create("c", 2)
    collection.upsert(["first"], [[1, 0]])
    gate, syncs = threading.Event(), []
    import os

    real = os.fsync

    def slow(descriptor: int) -> None:
        gate.wait(10)  # until all the others stand in the queue
        syncs.append(descriptor)
        real(descriptor)

    monkeypatch.setattr("sihe.vectors.wal.os.fsync", slow)
    threads = [threading.Thread(target=collection.upsert, args=([n], [[n + 1, 1]])) for n in range(12)]
    for thread in threads:
        thread.start()
    while len(collection._commits._queue) < 11:
        pass
    gate.set()
    for thread in threads:
        thread.join()
    assert len(syncs) == 2  # the first thread's, and one for the eleven that waited meanwhile
    collection.close()
    assert collection.count() == 13


@pytest.mark.parametrize(
    ("ids", "vectors", "payloads", "error", "message"),
    [
        ([1], [[1, 2, 3]], None, InvalidVector, "dimension 2"),
        ([1], [[1, float("nan")]], None, InvalidVector, r"vectors\[0\]: expected finite"),
        ([1, 2], [[1, 2], [1, float("inf")]], None, InvalidVector, r"vectors\[1\]"),
        ([1], [[1, 1e39]], None, InvalidVector, "finite"),
        ([1], [[0, 0]], None, InvalidVector, "no direction"),
        ([1], [["1", "2"]], None, InvalidVector, "type <U1"),
        ([1, 2], [[1, 2], [1]], None, InvalidVector, "inhomogeneous"),
        ([1, 1], [[1, 2], [3, 4]], None, InvalidInput, "id 1 comes twice"),
        ([True], [[1, 2]], None, InvalidInput, "got True"),
        ([-1], [[1, 2]], None, InvalidInput, "got -1"),
        ([2**64], [[1, 2]], None, InvalidInput, "2\\^64"),
        ([""], [[1, 2]], None, InvalidInput, "got ''"),
        (["a\n"], [[1, 2]], None, InvalidInput, "printable"),
        (["\ud800"], [[1, 2]], None, InvalidInput, "printable"),
        ("a", [[1, 2]], None, InvalidInput, r"write \['a'\]"),
        ([1], [[1, 2]], [{}, {}], InvalidInput, "as many payloads"),
        ([1], [[1, 2]], [{"a": float("nan")}], InvalidPayload, r"payloads\[0\]\.a: expected a finite"),
        ([1], [[1, 2]], [{"a": {1, 2}}], InvalidPayload, "got set"),
        ([1], [[1, 2]], [{1: 2}], InvalidPayload, "texts as keys"),
        ([1], [[1, 2]], [["a"]], InvalidPayload, "JSON object"),
        ([1], [[1, 2]], [{"a": "\ud800"}], InvalidPayload, "surrogates"),
        ([1], [[1, 2]], [{"a": "x" * (1 << 20)}], InvalidInput, "at most 1048576 bytes"),
    ],
)
def test_bad_input_is_refused_by_name_and_nothing_is_stored(
    database: Database, ids: Any, vectors: Any, payloads: Any, error: type[Exception], message: str
) -> None:
    collection = database.create("c", 2)
    with pytest.raises(error, match=message):
        collection.upsert(ids, vectors, payloads)
    assert collection.count() == 0


@pytest.mark.parametrize("query", [[1], [1, float("nan")], [0, 0], "ab", [[1, 2]]])
def test_bad_queries_are_refused(database: Database, query: Any) -> None:
    collection = database.create("c", 2)
    with pytest.raises(InvalidVector):
        collection.search(query)
    with pytest.raises(InvalidInput, match="k: expected"):
        collection.search([1, 1], 0)


def test_extreme_lengths_keep_their_scores(database: Database) -> None:
    collection = database.create("c", 2)
    collection.upsert([1, 2, 3], [[1e18, 0], [1e-18, 1e-18], [0, 5]])
    scores = {hit.id: hit.score for hit in collection.search([1e17, 1e17], 3)}
    assert scores == pytest.approx({1: 0.5**0.5, 2: 1.0, 3: 0.5**0.5}, rel=1e-5)


def test_results_are_copies(database: Database) -> None:
    collection = database.create("c", 2)
    given = {"a": [1]}
    collection.upsert([1], [[1, 0]], [given])
    given["a"].append(2)
    point = collection.get([1])[0]
    point.payload["a"].append(3)
    point.vector[:] = 9
    assert collection.get([1])[0].payload == {"a": [1]}
    assert collection.get([1])[0].vector.tolist() == [1, 0]


def test_names(database: Database) -> None:
    assert database.names() == []
    database.create("b", 2)
    database.create("a", 2)
    assert database.names() == ["a", "b"]
    with pytest.raises(AlreadyExists):
        database.create("a", 3)
    with pytest.raises(NotFound, match="no collection named 'c'"):
        database.collection("c")
    with pytest.raises(InvalidInput):
        database.create("../x", 2)
    with pytest.raises(InvalidInput, match="metric"):
        database.create("m", 2, "euclid")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="dim"):
        database.create("m", 0)


def test_a_dropped_collection_is_gone_for_everybody(database: Database, tmp_path: Path) -> None:
    collection = database.create("a", 2)
    collection.upsert([1], [[1, 1]])
    other = Database(tmp_path / "db").collection("a")
    assert other.count() == 1
    database.drop("a")
    assert database.names() == []
    assert [entry.name for entry in (tmp_path / "db").iterdir() if not entry.name.endswith(".lock")] == []
    with pytest.raises(NotFound):
        other.count()
    assert database.create("a", 3).count() == 0


def test_flushes_and_merges_happen_by_themselves(tmp_path: Path) -> None:
    Database(tmp_path).create("c", 2)
    collection = Collection(tmp_path / "c", flush_bytes=1, max_segments=3)
    for n in range(30):
        collection.upsert([n % 7], [[n + 1, 1]])
        assert collection.info().segments <= 3
    assert collection.info().log_bytes == 0
    collection.close()
    assert collection.count() == 7
    folders = {entry.name for entry in (tmp_path / "c").iterdir()}
    assert (
        len([name for name in folders if "segment" in name and not name.endswith(".lock")])
        == collection.info().segments
    )


def test_manifest_of_an_unknown_metric_or_a_changed_byte_is_refused(database: Database, tmp_path: Path) -> None:
    from sihe.core.errors import CorruptData

    database.create("c", 2)
    path = tmp_path / "db" / "c" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"dim": 2', b'"dim": 3'))
    with pytest.raises(CorruptData, match="checksum"):
        Database(tmp_path / "db").collection("c")
    path.write_text("[]")
    with pytest.raises(CorruptData):
        Database(tmp_path / "db").collection("c")
    assert Manifest("c", 2, "cosine").metric == "cosine"
