"""The Host rule, the same-origin rule and the key rule, each with what it must refuse."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers
from starlette.requests import Request

from sihe.console.security import (
    POLICY,
    is_foreign_host,
    is_foreign_write,
    is_loopback,
)


def request(method: str, **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": method, "path": "/models", "query_string": b"", "headers": raw})


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({}, False),
        ({"sec_fetch_site": "same-origin"}, False),
        ({"sec_fetch_site": "none"}, False),
        ({"sec_fetch_site": "cross-site"}, True),
        ({"sec_fetch_site": "same-site"}, True),
        ({"origin": "http://127.0.0.1:8484"}, False),
        ({"origin": "http://evil.example"}, True),
        ({"origin": "null"}, True),
        ({"origin": "http://127.0.0.1:9999"}, True),
    ],
)
def test_writes_of_other_sites(headers: dict[str, str], foreign: bool) -> None:
    assert is_foreign_write(request("POST", host="127.0.0.1:8484", **headers)) is foreign
    assert not is_foreign_write(request("GET", host="127.0.0.1:8484", **headers))


@pytest.mark.parametrize("host", ["127.0.0.1:8484", "localhost", "[::1]:8484", "sihe.localhost"])
def test_names_of_this_machine(host: str) -> None:
    assert not is_foreign_host(Headers({"host": host}), listening_on="127.0.0.1")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8484", ""])
def test_a_strangers_name_for_this_machine(host: str) -> None:
    assert is_foreign_host(Headers({"host": host}), listening_on="127.0.0.1")
    assert not is_foreign_host(Headers({"host": host}), listening_on="0.0.0.0")


def test_loopback() -> None:
    assert is_loopback("127.8.9.1")
    assert is_loopback("::1")
    assert not is_loopback("10.0.0.1")
    assert not is_loopback("0.0.0.0")


def test_the_policy_lets_nothing_inline_run() -> None:
    assert "unsafe" not in POLICY
    assert "default-src 'none'" in POLICY
    assert "*" not in POLICY
    assert "http" not in POLICY
