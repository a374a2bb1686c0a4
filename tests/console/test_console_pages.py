"""Every page, in both languages, with real things behind it; and what none may contain."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from fastapi.testclient import TestClient

from sihe.console.security import POLICY
from sihe.core.errors import NoSpace

HTML = {"accept": "text/html"}


class Reader(HTMLParser):
    """Elements with their attributes, and the text of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def get(client: TestClient, path: str, language: str = "en", **headers: str) -> Any:
    return client.get(path, headers={**HTML, "accept-language": language, **headers})


def broken_rules(html: str) -> list[str]:
    """What the page's own policy would refuse, and what would leave the machine."""
    reader = Reader(html)
    found = [f"inline style on {tag}" for tag, attributes in reader.elements if "style" in attributes]
    found += [f"handler {name}" for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    found += ["a <style>"] * len(reader.all("style"))
    found += [
        f"inline script {item}"
        for item in reader.all("script")
        if "src" not in item and item.get("type") != "application/json"
    ]
    loaded = [
        item.get(name, "")
        for tag in ("script", "link", "img", "iframe", "use")
        for item in reader.all(tag)
        for name in ("src", "href")
    ]
    found += [f"loads {url}" for url in loaded if url and not url.startswith(("/", "#"))]
    found += [
        f"posts to {item['action']}" for item in reader.all("form") if not item.get("action", "/").startswith("/")
    ]
    found += [
        f"id {item} twice"
        for item in _repeated([attributes["id"] for _, attributes in reader.elements if "id" in attributes])
    ]
    return found


def _repeated(names: list[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1}


def test_every_page_answers_in_both_languages(
    client: TestClient, paths: dict[str, str], page: str, language: str
) -> None:
    answer = get(client, paths[page], language)
    assert answer.status_code == (404 if page == "nothing" else 200), answer.text[:2000]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    reader = Reader(answer.text)
    assert reader.all("html")[0]["lang"] == {"en": "en", "zh": "zh-CN"}[language]
    assert len(reader.all("h1")) == 1
    assert ("跳到正文" in answer.text) == (language == "zh")
    assert broken_rules(answer.text) == []
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"


def test_the_rules_for_pages_can_fail() -> None:
    bad = (
        '<p style="color:red" onclick="x()" id=a><script>x()</script><style>p{}</style><b id=a></b>'
        '<img src="https://evil.example/a.png"><form action="//evil.example"></form>'
    )
    assert len(broken_rules(bad)) == 6


def test_links_inside_lead_somewhere(client: TestClient, paths: dict[str, str]) -> None:
    seen: dict[str, int] = {}
    for path in paths.values():
        for link in Reader(get(client, path).text).all("a"):
            target = link["href"].partition("#")[0]
            if target.startswith("/") and target not in seen:
                seen[target] = get(client, target).status_code
    assert len(seen) > 30
    assert {target for target, status in seen.items() if status != 200} == set()


def test_a_choice_of_language_and_theme_is_remembered(client: TestClient) -> None:
    client.cookies.clear()
    try:
        assert 'lang="zh-CN" data-theme="dark"' in get(client, "/about?lang=zh&theme=dark").text
        assert 'lang="zh-CN" data-theme="dark"' in get(client, "/about").text
        assert 'lang="en" data-theme="dark"' in get(client, "/about?lang=en").text
    finally:
        client.cookies.clear()


def test_a_theme_that_is_none_changes_nothing(client: TestClient) -> None:
    assert 'data-theme="auto"' in get(client, '/about?theme="><script>').text
    assert not client.cookies


def test_static_files_are_kept_only_under_their_digest(client: TestClient) -> None:
    address = re.search(r'href="(/static/app\.css\?v=[0-9a-f]{12})"', get(client, "/about").text)
    assert address
    assert "immutable" in client.get(address[1]).headers["cache-control"]
    assert client.get("/static/app.css").headers["cache-control"] == "no-cache"
    assert client.get("/static/../app.py").status_code == 404
    assert client.get("/static/%2e%2e/app.py").status_code == 404


def test_pages_are_compressed_and_streams_are_not(client: TestClient, paths: dict[str, str]) -> None:
    assert client.get("/about", headers={**HTML, "accept-encoding": "gzip"}).headers["content-encoding"] == "gzip"
    with client.stream("GET", paths["run"] + "/stream", headers={"accept-encoding": "gzip"}) as stream:
        assert "content-encoding" not in stream.headers
        stream.read()


@pytest.mark.parametrize(
    "path", ["/runs/nobody", "/models/none/alias", "/labs/none", "/coach/none", "/playground/none", "/topics/none"]
)
def test_what_does_not_exist_is_a_page_that_says_so(client: TestClient, path: str) -> None:
    answer = get(client, path)
    assert answer.status_code in (404, 405)
    assert "<nav" in answer.text
    assert client.get(path, headers={"accept": "application/json"}).json()["error"]["message"] is not None


def test_errors_take_the_form_of_the_path(client: TestClient) -> None:
    openai = client.post("/v1/completions", json={"model": "none", "prompt": "a"})
    assert openai.status_code == 404
    assert set(openai.json()["error"]) == {"message", "type", "param", "code"}
    assert "none" in openai.json()["error"]["message"]
    fragment = client.get("/runs/nobody", headers={"hx-request": "true"})
    assert fragment.status_code == 404
    assert fragment.text.startswith("<div")
    assert 'role="alert"' in fragment.text
    invalid = get(client, "/runs?limit=none")
    assert invalid.status_code == 422
    assert "limit" in invalid.text


def test_a_full_disk_and_a_bug_have_pages_that_keep_secrets(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sihe.core.tracking import Tracking

    def full(*_: object, **__: object) -> None:
        raise NoSpace("/data")

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(Tracking, "runs", full)
    answer = get(client, "/runs")
    assert answer.status_code == 507
    assert "no space left" in answer.text
    monkeypatch.setattr(Tracking, "runs", broken)
    answer = get(client, "/runs")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["content-security-policy"] == POLICY
    assert client.get("/runs").json() == {"error": {"message": "", "type": "InternalError"}}


def test_health_and_metrics(client: TestClient) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    client.get("/runs/abc")
    text = client.get("/metrics").text
    assert 'sihe_http_requests_total{method="GET",route="/runs/{run_id}",status="404"}' in text
    assert "/runs/abc" not in text
    client.request("BREW", "/runs")
    assert 'method="BREW"' not in client.get("/metrics").text


def test_no_documentation_page_that_loads_from_a_cdn(client: TestClient) -> None:
    assert client.get("/docs").status_code == 404
    assert client.get("/redoc").status_code == 404
    assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]
