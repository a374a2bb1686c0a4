"""Keys and who they belong to: on both databases, with a clock whose hands the tests turn."""

from __future__ import annotations

import re
import threading
import traceback
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from sihe.core.clock import FakeClock
from sihe.core.errors import InvalidInput, NotFound, Unauthorized, Unreachable
from sihe.core.records import Records
from sihe.serving.tenants.directory import STALE_AFTER_S, Directory
from sihe.serving.tenants.secret import digest, is_match, new_secret, public_id, session_of
from sihe.serving.tenants.store import TenantStore
from sihe.serving.tenants.types import ANYBODY, Limits, Right, Tenant

FORM = re.compile(r"sihe_[0-9a-hjkmnp-tv-z]{12}_[A-Za-z0-9_-]{43}")  # the one that secret.py gives to scanners


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(records: Records, clock: FakeClock) -> TenantStore:
    return TenantStore(records, clock)


def directory_of(store: TenantStore, clock: FakeClock, *configured: str, require_key: bool = False) -> Directory:
    return Directory(lambda: store, configured=configured, require_key=require_key, clock=clock)


# ---- the form of a key ---------------------------------------------------------------------------------------------


def test_a_key_has_its_form_and_shows_itself_nowhere_else() -> None:
    secrets = [new_secret() for _ in range(200)]
    assert len({secret.text for secret in secrets}) == len({secret.id for secret in secrets}) == 200
    for secret in secrets:
        assert FORM.fullmatch(secret.text)
        assert public_id(secret.text) == secret.id
        assert is_match(secret.text, secret.digest)
        assert digest(session_of(secret.text)) == secret.session_digest
        hidden = secret.text.split("_", 2)[2]
        assert hidden not in repr(secret) + secret.digest + secret.session_digest + session_of(secret.text)


@settings(deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_taken_apart_without_an_error(text: str) -> None:
    assert public_id(text) is None or text.startswith("sihe_")
    assert not is_match(text, new_secret().digest)


# ---- what is stored ------------------------------------------------------------------------------------------------


def test_a_key_comes_back_as_it_was_made_and_its_secret_does_not(store: TenantStore, records: Records) -> None:
    made, secret = store.create_key(
        "ci",
        tenant="acme",
        rights=frozenset({Right.INFER, Right.DEPLOY}),
        deployments=frozenset({"chat", "code"}),
        limits=Limits(requests_per_min=5, tokens_per_day=1000),
    )
    assert store.keys() == [made]
    assert store.keys("acme") == [made]
    assert store.keys("other") == []
    assert [tenant.name for tenant in store.tenants()] == ["default", "acme"]
    with records.snapshot() as connection:
        rows = repr(connection.exec_driver_sql("SELECT * FROM sihe_api_keys").all())
    assert secret.text not in rows
    assert secret.text.split("_", 2)[2] not in rows


def test_tenants_are_recorded_and_changed(store: TenantStore) -> None:
    assert store.tenants() == [Tenant()]
    acme = Tenant("acme", Limits(concurrency=3), priority=-2, is_isolated=True)
    store.put_tenant(acme)
    assert store.tenant("acme") == acme
    store.put_tenant(Tenant("acme"))
    assert store.tenant("acme") == Tenant("acme")
    with pytest.raises(NotFound):
        store.tenant("nobody")


@pytest.mark.parametrize("id", ["", "absent", "'; DROP TABLE sihe_api_keys; --"])
def test_keys_that_are_not_there(store: TenantStore, id: str) -> None:
    for change in (store.rotate_key, lambda it: store.set_enabled(it, enabled=False)):
        with pytest.raises(NotFound):
            change(id)


def test_bad_values_are_refused(store: TenantStore, clock: FakeClock) -> None:
    with pytest.raises(InvalidInput, match="dead already"):
        store.create_key("k", expires_at=clock.now())
    with pytest.raises(InvalidInput, match="at least one right"):
        store.create_key("k", rights=frozenset())
    with pytest.raises(InvalidInput, match="key name"):
        store.create_key("a\r\nx-admin: 1")
    with pytest.raises(InvalidInput, match="tenant name"):
        store.create_key("k", tenant="a b")
    for bad in ({"requests_per_min": 0}, {"tokens_per_min": True}, {"concurrency": 1.5}, {"speed": 1}):
        with pytest.raises(InvalidInput, match=next(iter(bad))):
            Limits.from_mapping(bad)
    assert store.keys() == []


def test_changes_at_once_are_all_counted(store: TenantStore) -> None:
    before = store.revision()
    threads = [threading.Thread(target=store.create_key, args=(f"k{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.keys()) == 8
    assert store.revision() == before + 8


# ---- who is calling ------------------------------------------------------------------------------------------------


def test_a_key_says_who_calls(store: TenantStore, clock: FakeClock) -> None:
    store.put_tenant(Tenant("acme", priority=4, is_isolated=True))
    made, secret = store.create_key("k", tenant="acme", deployments=frozenset({"chat"}))
    caller = directory_of(store, clock).caller(secret.text)
    assert (caller.tenant.name, caller.key_id, caller.rights) == ("acme", made.id, {Right.INFER})
    assert caller.may_use("chat")
    assert not caller.may_use("code")
    assert not caller.may(Right.DEPLOY)
    assert (caller.priority(0), caller.priority(9), caller.priority(-9)) == (4, 13, 4)


def test_no_tenant_can_name_the_salt_of_an_isolated_one() -> None:
    isolated = ANYBODY.__class__(Tenant("acme", is_isolated=True), "", frozenset())
    asked = ("", "x", "tenant:acme:", "shared:", "tenant:acme:x")
    own = {isolated.cache_salt(salt) for salt in asked}
    assert own.isdisjoint({ANYBODY.cache_salt(salt) for salt in asked})
    assert own.isdisjoint(
        {ANYBODY.__class__(Tenant("acm", is_isolated=True), "", frozenset()).cache_salt(salt) for salt in asked}
    )
    assert ANYBODY.cache_salt("") == ""


def wrong_tokens(right: str) -> list[str]:
    head, secret = right[:18], right[18:]
    other = "A" if secret[-2] != "A" else "B"
    return ["", "x", right[:-1], right + "x", head + "x" * 43, right[:-2] + other + right[-1], "sihe__", right * 100]


def test_wrong_tokens_open_nothing(store: TenantStore, clock: FakeClock) -> None:
    _, secret = store.create_key("k")
    directory = directory_of(store, clock)
    said = set()
    for token in (*wrong_tokens(secret.text), secret.digest, secret.session_digest, session_of(secret.text)):
        with pytest.raises(Unauthorized) as caught:
            directory.caller(token)
        said.add(str(caught.value))
    assert len(said) == 1  # the message does not tell which part was wrong


def test_a_disabled_or_expired_key_opens_nothing(store: TenantStore, clock: FakeClock) -> None:
    made, secret = store.create_key("k", expires_at=clock.now() + timedelta(hours=1))
    directory = directory_of(store, clock)
    assert directory.caller(secret.text).key_id == made.id
    other_process = TenantStore(store._records, clock)
    other_process.set_enabled(made.id, enabled=False)
    clock.advance(STALE_AFTER_S)
    with pytest.raises(Unauthorized):
        directory.caller(secret.text)
    other_process.set_enabled(made.id, enabled=True)
    clock.advance(STALE_AFTER_S)
    assert directory.caller(secret.text).key_id == made.id
    clock.advance(3600)
    with pytest.raises(Unauthorized):
        directory.caller(secret.text)


def test_a_disabled_tenants_keys_open_nothing(store: TenantStore, clock: FakeClock) -> None:
    _, secret = store.create_key("k", tenant="acme")
    directory = directory_of(store, clock)
    directory.caller(secret.text)
    store.put_tenant(Tenant("acme", is_disabled=True))
    directory.refresh(now=True)
    with pytest.raises(Unauthorized):
        directory.caller(secret.text)


def test_a_rotated_key_works_for_its_grace_beside_the_new_one(store: TenantStore, clock: FakeClock) -> None:
    made, old = store.create_key("k", tenant="acme", deployments=frozenset({"chat"}), limits=Limits(concurrency=2))
    replacement, new = store.rotate_key(made.id, grace_s=60)
    assert (replacement.name, replacement.tenant, replacement.deployments, replacement.limits) == (
        made.name, made.tenant, made.deployments, made.limits,
    )  # fmt: skip
    directory = directory_of(store, clock)
    assert directory.caller(old.text).key_id == made.id
    assert directory.caller(new.text).key_id == replacement.id
    clock.advance(60)
    with pytest.raises(Unauthorized):
        directory.caller(old.text)
    assert directory.caller(new.text).key_id == replacement.id
    with pytest.raises(InvalidInput, match="expired"):
        store.rotate_key(made.id)


def test_the_door_is_open_until_the_first_key_and_never_again(store: TenantStore, clock: FakeClock) -> None:
    directory = directory_of(store, clock)
    assert directory.caller("whatever a client sends") == ANYBODY
    made, secret = store.create_key("k")
    clock.advance(STALE_AFTER_S)
    assert directory.caller(secret.text).key_id == made.id
    store.set_enabled(made.id, enabled=False)
    clock.advance(STALE_AFTER_S)
    for token in ("", "x", secret.text):
        with pytest.raises(Unauthorized):
            directory.caller(token)
    assert not directory_of(TenantStore(store._records, clock), clock, require_key=True).is_open


def test_configured_keys_go_on_to_work_and_short_ones_can_be_set_aside(store: TenantStore, clock: FakeClock) -> None:
    _, secret = store.create_key("k")
    directory = directory_of(store, clock, "right", "钥匙")
    assert directory.caller("right").rights == set(Right)
    assert (directory.caller("钥匙").key_id, directory.caller("钥匙").tenant.name) == ("settings.2", "default")
    with pytest.raises(Unauthorized):
        directory.caller("right", trust_short_keys=False)
    assert directory.caller(secret.text, trust_short_keys=False).rights == {Right.INFER}


@pytest.mark.parametrize("is_configured", [True, False])
def test_a_session_proves_a_key_and_is_none(store: TenantStore, clock: FakeClock, is_configured: bool) -> None:
    made, secret = store.create_key("k", rights=frozenset({Right.ADMIN}))
    key = "right" if is_configured else secret.text
    directory = directory_of(store, clock, "right")
    session = directory.open_session(key)
    assert key not in session
    caller = directory.caller_of_session(session)
    assert caller.key_id == ("settings.1" if is_configured else made.id)
    for wrong in (key, session[:-1], "", ".", f"{made.id}.", f".{secret.session_digest}", f"{made.id}.{secret.digest}"):
        with pytest.raises(Unauthorized):
            directory.caller_of_session(wrong)
    with pytest.raises(Unauthorized):
        directory.caller(session)
    with pytest.raises(Unauthorized):
        directory.open_session("wrong")


# ---- what it costs -------------------------------------------------------------------------------------------------


def test_tokens_that_were_made_up_cost_the_database_nothing(store: TenantStore, clock: FakeClock) -> None:
    _, secret = store.create_key("k")
    directory = directory_of(store, clock)
    directory.caller(secret.text)
    statements: list[str] = []

    @event.listens_for(store._records.engine, "before_cursor_execute")
    def heard(*said: object) -> None:
        statements.append(str(said[2]))

    for _ in range(50):
        directory.caller(secret.text)
        with pytest.raises(Unauthorized):
            directory.caller(new_secret().text)
    assert statements == []
    clock.advance(STALE_AFTER_S)
    directory.caller(secret.text)
    assert [said for said in statements if "sihe_api_keys" in said] == []  # nothing has changed: one number was read
    assert len([said for said in statements if "revision" in said]) == 1


def test_what_was_known_goes_on_while_the_records_do_not_answer(store: TenantStore, clock: FakeClock) -> None:
    made, secret = store.create_key("k")
    answers = [True]

    def opened() -> TenantStore:
        if not answers[0]:
            raise Unreachable("the records", "gone")
        return store

    directory = Directory(opened, configured=(), require_key=False, clock=clock)
    directory.caller(secret.text)
    answers[0] = False
    for _ in range(30):
        clock.advance(1)
        assert directory.caller(secret.text).key_id == made.id
    clock.advance(1)
    with pytest.raises(Unreachable):
        directory.caller(secret.text)
    answers[0] = True
    clock.advance(STALE_AFTER_S)
    assert directory.caller(secret.text).key_id == made.id
    with pytest.raises(Unreachable):  # nothing is known yet
        Directory(lambda: (_ for _ in ()).throw(Unreachable("r", "gone")), configured=("a",), require_key=False,
                  clock=clock).caller("a")  # fmt: skip


def test_when_keys_were_used_is_told_once(store: TenantStore, clock: FakeClock) -> None:
    made, secret = store.create_key("k")
    directory = directory_of(store, clock)
    directory.caller(secret.text)
    used = directory.take_used()
    assert used == {made.id: clock.now()}
    assert directory.take_used() == {}
    before = store.revision()
    store.touch(used)
    assert store.keys()[0].last_used_at == clock.now()
    assert store.revision() == before


def test_who_finds_the_records_being_read_goes_on_with_what_is_known(store: TenantStore, clock: FakeClock) -> None:
    made, secret = store.create_key("k")
    reading, go = threading.Event(), threading.Event()
    hangs = [False]

    def opened() -> TenantStore:
        if hangs[0]:
            reading.set()
            assert go.wait(30)
        return store

    directory = Directory(opened, configured=(), require_key=False, clock=clock)
    directory.caller(secret.text)
    hangs[0] = True
    clock.advance(STALE_AFTER_S)
    reader = threading.Thread(target=directory.refresh)
    reader.start()
    assert reading.wait(30)
    assert directory.caller(secret.text).key_id == made.id  # at once, while the database hangs
    go.set()
    reader.join()


def test_an_event_loop_looks_at_what_is_known_and_never_reads(store: TenantStore, clock: FakeClock) -> None:
    made, secret = store.create_key("k")
    directory = directory_of(store, clock)
    directory.refresh()
    clock.advance(3600)  # it has become old between the look and this
    statements: list[str] = []
    event.listen(store._records.engine, "before_cursor_execute", lambda *said: statements.append(str(said[2])))
    assert directory.known(secret.text, "", trust_short_keys=True).key_id == made.id
    assert statements == []


def test_an_outage_that_many_are_told_of_keeps_nothing_of_them(clock: FakeClock) -> None:
    def gone() -> TenantStore:
        raise Unreachable("the records", "gone")

    directory = Directory(gone, configured=(), require_key=False, clock=clock)
    depths = []
    for _ in range(20):
        with pytest.raises(Unreachable) as caught:
            directory.refresh()
        depths.append(len(list(traceback.walk_tb(caught.value.__traceback__))))
    assert depths[-1] <= depths[1] + 1
