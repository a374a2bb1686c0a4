"""Rates, quotas and concurrency of tenants over HTTP, as the unmodified `openai` client meets them."""

import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from sihe.serving.gateway.gateway import Gateway
from sihe.serving.tenants import Limits, Tenant
from support.tenant_door import PROMPT, Door, complete, held, opened_door


@pytest.fixture
def door(gateway: Gateway, tmp_path: Path) -> Iterator[Door]:
    with opened_door(gateway, tmp_path) as opened:
        yield opened


def test_requests_a_minute(door: Door) -> None:
    client = door.client(door.key(requests_per_min=2))
    first = complete(client)
    assert (first["x-ratelimit-limit-requests"], first["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert first["x-ratelimit-reset-requests"] == "30s"
    complete(client)
    with pytest.raises(openai.RateLimitError) as caught:
        complete(client)
    headers = caught.value.response.headers
    assert (headers["retry-after"], headers["x-ratelimit-remaining-requests"]) == ("30", "0")
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
    door.clock.advance(int(headers["retry-after"]))
    complete(client)
    assert 'sihe_tenant_refused_total{reason="requests",tenant="acme"} 1.0' in door.metrics()


def test_tokens_are_taken_as_estimated_and_settled_as_used(door: Door) -> None:
    client = door.client(door.key(tokens_per_min=100))
    assert complete(client, 40)["x-ratelimit-remaining-tokens"] == "50"  # 10 + 40
    stop = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text[1:3]
    # 100 - 50 - 18 are left; of the 28 that this one might take, those behind the stop string come back
    headers = complete(client, 18, stop=[stop])
    assert headers["x-ratelimit-remaining-tokens"] == "4"
    tally = door.access.usage.read
    door.access.flush()
    used = sum(row.tally.tokens for row in tally())
    assert used < 50 + 18 + 28
    with pytest.raises(openai.RateLimitError) as caught:
        complete(client, 90)
    assert caught.value.response.headers["x-ratelimit-remaining-tokens"] == str(100 - used)
    assert caught.value.type == "tokens"
    with pytest.raises(openai.APIStatusError, match="this request alone needs 101") as large:
        complete(client, 91)
    assert large.value.status_code == 413


def test_a_limit_that_is_smaller_than_a_usual_answer_lets_open_ends_pass(door: Door) -> None:
    client = door.client(door.key(tokens_per_min=300, tokens_per_day=250))
    chat = [{"role": "user", "content": "pack my box"}]
    first = client.chat.completions.create(model="tiny", messages=chat)  # type: ignore[arg-type]
    assert first.usage is not None
    left = 250 - first.usage.total_tokens
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=chat, max_tokens=1)  # type: ignore[arg-type]
    assert int(raw.headers["x-ratelimit-remaining-tokens"]) > left  # what was guessed too much came back
    door.clock.advance(60)
    with pytest.raises(openai.RateLimitError, match="tokens a day"):
        complete(client, left)


def test_a_tenants_limit_holds_for_all_its_keys_together(door: Door) -> None:
    door.store.put_tenant(Tenant("acme", Limits(requests_per_min=2)))
    first, second, other = door.client(door.key()), door.client(door.key()), door.client(door.key("zeta"))
    complete(first)
    complete(second)
    for client in (first, second):
        with pytest.raises(openai.RateLimitError):
            complete(client)
    complete(other)


def test_a_quota_ends_with_its_day_and_clients_do_not_try_until_then(door: Door) -> None:
    client = door.client(door.key(tokens_per_day=30), max_retries=2)
    complete(client, 5)
    complete(client, 5)
    door.sent.clear()
    with pytest.raises(openai.RateLimitError) as caught:
        complete(client, 5)
    assert (caught.value.code, len(door.sent)) == ("insufficient_quota", 1)
    assert int(caught.value.response.headers["retry-after"]) == 24 * 3600
    door.clock.advance(24 * 3600)
    complete(client, 5)


def test_what_is_running_counts_for_a_quota(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as (reached, go):
        key = door.key(tokens_per_month=61, concurrency=2)
        thread = threading.Thread(target=complete, args=(door.client(key), 40))
        thread.start()
        assert reached.wait(30)
        with pytest.raises(openai.RateLimitError) as caught:
            complete(door.client(key), 10)
        assert caught.value.code == "insufficient_quota"
        go.set()
        thread.join()
        complete(door.client(key), 1)  # 50 are used: those that were only promised are free again


def test_only_so_many_at_once(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as (reached, go):
        key = door.key(concurrency=1)
        thread = threading.Thread(target=complete, args=(door.client(key),))
        thread.start()
        assert reached.wait(30)
        with pytest.raises(openai.RateLimitError) as caught:
            complete(door.client(key))
        assert caught.value.type == "concurrency"
        go.set()
        thread.join()
        complete(door.client(key))
