"""`sihe keys …`, as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date

import pytest
from typer.testing import CliRunner

from sihe.core import terminal
from sihe.core.errors import InvalidInput, NotFound
from sihe.core.workspace import Workspace
from sihe.serving.tenants import Limits, Right, Tenant, TenantStore
from sihe.serving.tenants.commands import app
from sihe.serving.tenants.secret import public_id
from sihe.serving.tenants.usage import Account, Tally, UsageStore


@pytest.fixture
def store(workspace: Workspace) -> Iterator[TenantStore]:
    terminal.set_flags({"home": str(workspace.home)})
    yield TenantStore(workspace.records, workspace.clock)
    terminal.set_flags({})


def call(*words: str) -> str:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_key_is_printed_once_and_lives_by_its_id(store: TenantStore) -> None:
    key = call("create", "ci", "--tenant", "acme", "--right", "infer", "--right", "deploy", "--model", "chat",
               "--limit", "requests_per_min=5", "--days", "30").strip()  # fmt: skip
    (made,) = store.keys()
    assert public_id(key) == made.id
    assert (made.tenant, made.rights, made.deployments) == ("acme", {Right.INFER, Right.DEPLOY}, {"chat"})
    assert made.limits == Limits(requests_per_min=5)
    assert made.expires_at is not None
    assert round((made.expires_at - made.created_at).total_seconds() / 86_400) == 30
    for shown in (call("list"), call("list", "--json")):
        assert made.id in shown
        assert key not in shown
    new = json.loads(call("rotate", made.id, "--grace", "60", "--json"))
    assert new["key"].startswith(f"sihe_{new['id']}_")
    call("disable", new["id"])
    assert "disabled" in call("list", "--tenant", "acme")
    call("enable", new["id"])
    call("limit", new["id"], "concurrency=2")
    assert store.key(new["id"]).limits == Limits(concurrency=2)
    assert store.key(new["id"]).disabled_at is None
    assert json.loads(call("list", "--tenant", "nobody", "--json")) == []


def test_tenants(store: TenantStore) -> None:
    call("tenant", "acme", "--limit", "tokens_per_day=100", "--priority", "-3", "--isolated")
    assert store.tenant("acme") == Tenant("acme", Limits(tokens_per_day=100), -3, is_isolated=True)
    assert "tokens_per_day=100" in call("tenants")
    call("tenant", "acme", "--disabled")
    assert [item["name"] for item in json.loads(call("tenants", "--json")) if item["is_disabled"]] == ["acme"]


def test_usage(store: TenantStore, workspace: Workspace) -> None:
    accounts = [Account(date(2026, 1, day), tenant, "k", "chat") for day in (1, 2) for tenant in ("acme", "zeta")]
    UsageStore(workspace.records).add(dict.fromkeys(accounts, Tally(1, 0, 10, 2, 5)))
    assert [row["tenant"] for row in json.loads(call("usage", "--since", "2026-01-02", "--json"))] == ["acme", "zeta"]
    (row,) = json.loads(call("usage", "--by", "tenant", "--tenant", "acme", "--json"))
    assert row == {
        "tenant": "acme", "requests": 2, "failed": 0, "prompt_tokens": 20, "cached_tokens": 4, "completion_tokens": 10,
    }  # fmt: skip
    assert "acme" in call("usage")


def test_mistakes_are_errors_of_the_house(store: TenantStore) -> None:
    with pytest.raises(NotFound):
        call("disable", "absent")
    with pytest.raises(InvalidInput, match="everything"):
        call("create", "k", "--right", "everything")
    with pytest.raises(InvalidInput, match="speed"):
        call("create", "k", "--limit", "speed=3")
    for words in (("create", "k", "--limit", "fast"), ("usage", "--since", "yesterday"), ("usage", "--by", "hour")):
        assert CliRunner().invoke(app, words).exit_code == 2
    assert store.keys() == []


@pytest.mark.parametrize("days", ["nan", "1e12", "inf", "0"])
def test_a_key_ends_at_some_time_or_never(store: TenantStore, days: str) -> None:
    result = CliRunner().invoke(app, ("create", "k", "--days", days))
    assert (result.exit_code, store.keys()) == (2, [])
