"""Usage: nothing is lost or counted twice, on both databases, while processes die and the records are away."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from sihe.core.clock import FakeClock
from sihe.core.errors import Unreachable
from sihe.core.records import Records
from sihe.serving.tenants.ledger import Ledger
from sihe.serving.tenants.limits import Scope
from sihe.serving.tenants.metrics import MAX_TENANT_LABELS, OTHERS, TenantMetrics
from sihe.serving.tenants.usage import Account, Tally, UsageStore
from support.debian import wait_until

DAY = date(2026, 1, 1)  # the fake clock's
ONE = Tally(1, 0, 10, 4, 5)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'records.db'}"
    import psycopg

    server: str = request.getfixturevalue("postgres_url")
    name = f"t{abs(hash(str(tmp_path))):x}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.rpartition("/")[0] + f"/{name}"


@pytest.fixture
def records(url: str) -> Iterator[Records]:
    opened = Records(url)
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
def store(records: Records) -> UsageStore:
    return UsageStore(records)


def ledger_of(store: UsageStore, clock: FakeClock | None = None) -> Ledger:
    return Ledger(lambda: store, clock or FakeClock(), take_used=dict, touch=dict)


def spent_by(ledger: Ledger, scope: Scope, since: date) -> int:
    ledger.look_up(scope, since)
    return ledger.spent(scope, since)


def total(store: UsageStore) -> Tally:
    rows = store.read(by=())
    return rows[0].tally if rows else Tally()


def test_rows_add_up_and_are_read_by_what_is_asked(store: UsageStore) -> None:
    accounts = [
        Account(DAY, "acme", "k1", "chat"),
        Account(DAY, "acme", "k2", "chat"),
        Account(date(2026, 1, 2), "acme", "k1", "code"),
        Account(DAY, "zeta", "k3", "chat"),
    ]
    for _ in range(3):
        store.add(dict.fromkeys(accounts, ONE))
    store.add({})
    thrice = ONE + ONE + ONE
    assert [(row.day, row.tenant, row.key, row.deployment) for row in store.read()] == sorted(accounts)
    assert {row.tally for row in store.read()} == {thrice}
    assert [(row.tenant, row.tally.requests) for row in store.read(by=("tenant",))] == [("acme", 9), ("zeta", 3)]
    assert [row.day for row in store.read(since=date(2026, 1, 2))] == [date(2026, 1, 2)]
    assert [row.tenant for row in store.read(until=DAY, tenant="zeta", by=("tenant",))] == ["zeta"]
    assert store.read(tenant="nobody", by=()) == []
    assert store.tokens_since(Scope("tenant", "acme"), DAY) == 9 * 15
    assert store.tokens_since(Scope("tenant", "acme"), date(2026, 1, 2)) == 3 * 15
    assert store.tokens_since(Scope("key", "k3"), DAY) == 3 * 15
    assert store.tokens_since(Scope("key", "nobody"), DAY) == 0


def test_what_threads_add_is_all_written(store: UsageStore) -> None:
    ledger = ledger_of(store)

    def add() -> None:
        for number in range(200):
            ledger.add("acme", f"k{number % 3}", "chat", ONE)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.close()
    ledger.close()
    assert total(store) == Tally(800, 0, 8000, 3200, 4000)
    ledger.add("acme", "k0", "chat", ONE)  # a stream that ends after everything else
    assert total(store).requests == 801


def test_a_request_from_before_the_months_end_still_finds_what_was_spent(store: UsageStore) -> None:
    clock, scope = FakeClock(datetime(2026, 1, 31, 23, 59, tzinfo=UTC)), Scope("tenant", "a")
    ledger = ledger_of(store, clock)
    ledger.add("a", "k", "chat", Tally(1, 0, 7, 0, 0))
    january = clock.now().date().replace(day=1)
    ledger.look_up(scope, january)
    clock.advance(120)
    february = clock.now().date()
    assert spent_by(ledger, scope, february) == 0  # another request, in between
    assert ledger.spent(scope, january) == 7
    ledger.look_up(scope, date(2026, 3, 1))
    assert (scope, january) not in ledger._spent


def test_what_is_spent_is_told_at_once_and_once(store: UsageStore) -> None:
    dice, clock = random.Random(3), FakeClock(datetime(2026, 1, 30, tzinfo=UTC))
    ledger, other = ledger_of(store, clock), ledger_of(store, clock)
    spent: dict[tuple[str, date], int] = {}
    for _ in range(150):
        tenant, tokens = dice.choice("ab"), dice.randint(1, 50)
        today = clock.now().date()
        ledger.add(tenant, "k", "chat", Tally(1, 0, tokens, 0, 0))
        spent[tenant, today] = spent.get((tenant, today), 0) + tokens
        if dice.random() < 0.3:
            ledger.flush()
        if dice.random() < 0.1:
            clock.advance(3600 * 5)
        for name in "ab":
            for since in (today, today.replace(day=1)):
                truth = sum(value for (whose, day), value in spent.items() if whose == name and day >= since)
                assert spent_by(ledger, Scope("tenant", name), since) == truth
    other.add("a", "k", "chat", Tally(1, 0, 1000, 0, 0))
    other.flush()  # another process: seen as soon as what is known is too old
    clock.advance(2)
    today = clock.now().date()
    truth = 1000 + sum(value for (whose, day), value in spent.items() if whose == "a" and day >= today)
    assert spent_by(ledger, Scope("tenant", "a"), today) == truth
    ledger.close()
    other.close()


def test_nothing_is_lost_while_the_records_are_away(store: UsageStore, capsys: pytest.CaptureFixture[str]) -> None:
    answers, clock = [True], FakeClock()

    def opened() -> UsageStore:
        if not answers[0]:
            raise Unreachable("the records", "gone")
        return store

    ledger = Ledger(opened, clock, take_used=dict, touch=dict)
    scope = Scope("tenant", "acme")
    assert spent_by(ledger, scope, DAY) == 0
    answers[0] = False
    for number in range(1, 20):
        ledger.add("acme", "k", "chat", ONE)
        with pytest.raises(Unreachable):
            ledger.flush()
        clock.advance(5)
        assert spent_by(ledger, scope, DAY) == 15 * number  # what was known, and what has come since
    with pytest.raises(Unreachable):
        spent_by(ledger, Scope("tenant", "never seen"), DAY)
    answers[0] = True
    ledger.close()
    assert total(store).requests == 19


def test_what_could_not_be_written_at_the_end_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def away() -> UsageStore:
        raise Unreachable("the records", "gone")

    ledger = Ledger(away, FakeClock(), take_used=dict, touch=dict)
    ledger.add("acme", "k", "chat", ONE)
    ledger.close()
    assert "usage_lost" in "".join(capsys.readouterr())


WORKER = """
import sys
from sihe.core.clock import SystemClock
from sihe.core.records import Records
from sihe.serving.tenants.ledger import Ledger
from sihe.serving.tenants.usage import Tally, UsageStore
store = UsageStore(Records(sys.argv[1]))
ledger = Ledger(lambda: store, SystemClock(), take_used=dict, touch=dict)
for number in range(500):
    ledger.add("acme", "k", "chat", Tally(1, 0, 10, 4, 5))
print("added", flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
"""


def worker(url: str, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, url, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_processes_that_end_lose_nothing(url: str, records: Records, store: UsageStore) -> None:
    processes = [worker(url, "exit") for _ in range(3)]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert total(store) == Tally(1500, 0, 15_000, 6_000, 7_500)


def test_a_killed_process_loses_only_what_was_not_written_yet(url: str, records: Records, store: UsageStore) -> None:
    process = worker(url, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "added\n"
    wait_until(lambda: total(store).requests == 500, "the write of the ledger's own thread")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert total(store) == Tally(500, 0, 5_000, 2_000, 2_500)


def test_labels_are_bounded() -> None:
    registry = CollectorRegistry()
    metrics = TenantMetrics.on(registry)
    assert TenantMetrics.on(registry) is metrics
    for number in range(MAX_TENANT_LABELS + 50):
        metrics.ended(f"t{number}", "completed", ONE)
        metrics.refused(f"t{number}", "tokens")
    text = generate_latest(registry).decode()
    assert text.count("sihe_tenant_requests_total{") == MAX_TENANT_LABELS + 1
    assert f'sihe_tenant_requests_total{{outcome="completed",tenant="{OTHERS}"}} 50.0' in text
    assert f'sihe_tenant_tokens_total{{kind="cached",tenant="{OTHERS}"}} 200.0' in text


def test_a_database_that_hangs_keeps_no_request_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    writing, go = threading.Event(), threading.Event()

    class Hanging(UsageStore):
        def __init__(self) -> None:
            pass

        def add(self, batch: object) -> None:
            writing.set()
            assert go.wait(30)

        def tokens_since(self, scope: Scope, since: date) -> int:
            return 7

    monkeypatch.setattr("sihe.serving.tenants.ledger._PATIENCE_S", 0.05)
    store, day = Hanging(), date(2026, 1, 1)
    ledger = Ledger(lambda: store, FakeClock(), take_used=dict, touch=lambda _: None)
    ledger.look_up(Scope("tenant", "known"), day)
    writer = threading.Thread(target=ledger.flush)
    writer.start()
    assert writing.wait(30)
    ledger.look_up(Scope("tenant", "known"), day)
    assert ledger.spent(Scope("tenant", "known"), day) == 7
    with pytest.raises(Unreachable):
        ledger.look_up(Scope("tenant", "new"), day)
    go.set()
    writer.join()
    ledger.look_up(Scope("tenant", "new"), day)
