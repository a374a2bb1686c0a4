"""A real browser on every page: no accessibility violation, nothing refused by the policy, everything by keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from support.debian import ensure

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

AXE = Path(__file__).parent / "vendor" / "axe-core-4.14.1.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    binary = ensure("chromium", "chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    opened = browser.new_context(viewport={"width": 1280, "height": 800})
    opened.set_default_timeout(20_000)
    yield opened
    opened.close()


def violations(page: Page, rules: list[str]) -> list[str]:
    """What axe finds on the page as it stands, by these tags or rules."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text(encoding="utf-8") + "; null")
    kind = "tag" if rules is RULES else "rule"
    found: dict[str, Any] = page.evaluate(
        "only => axe.run(document, {resultTypes: ['violations'], runOnly: only})", {"type": kind, "values": rules}
    )
    return [
        f"{item['id']} at {node['target']}: {node['failureSummary']}"
        for item in found["violations"]
        for node in item["nodes"]
    ]


def open_page(context: BrowserContext, address: str, troubles: list[str] | None = None) -> Page:
    page = context.new_page()
    if troubles is not None:
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(address_of(address)) else troubles.append(f"asks {request.url}")
            ),
        )
    page.goto(address)
    return page


def address_of(url: str) -> str:
    found = re.match(r"https?://[^/]+", url)
    assert found
    return found[0]


def test_no_violation_and_no_trouble(
    context: BrowserContext, address: str, paths: dict[str, str], page: str, language: str
) -> None:
    troubles: list[str] = []
    separator = "&" if "?" in paths[page] else "?"
    opened = open_page(context, f"{address}{paths[page]}{separator}lang={language}&theme=light", troubles)
    if page in ("run", "lab-result"):
        opened.wait_for_selector("canvas")
    opened.evaluate("for (const hidden of document.querySelectorAll('details')) hidden.open = true")
    assert violations(opened, RULES) == []
    opened.evaluate("document.documentElement.dataset.theme = 'dark'")  # the other theme differs in its colours alone
    assert violations(opened, ["color-contrast", "link-in-text-block"]) == []
    assert [line for line in troubles if "404" not in line or page != "nothing"] == []


def test_axe_finds_what_is_wrong(context: BrowserContext, address: str) -> None:
    page = open_page(context, f"{address}/about")
    page.evaluate('document.body.innerHTML = \'<img src="/static/favicon.svg"><input><p style="color:#ccc">pale</p>\'')
    found = " ".join(violations(page, RULES))
    assert "image-alt" in found
    assert "label" in found


def test_the_policy_stops_an_inline_script(context: BrowserContext, address: str) -> None:
    troubles: list[str] = []
    page = open_page(context, f"{address}/about", troubles)
    page.evaluate(
        "const s = document.createElement('script'); s.textContent = 'window.owned = 1'; document.body.append(s)"
    )
    assert page.evaluate("window.owned") is None
    assert any("Content Security Policy" in line for line in troubles)


def test_small_screens_do_not_scroll_sideways(
    context: BrowserContext, address: str, paths: dict[str, str], page: str
) -> None:
    opened = context.new_page()
    opened.set_viewport_size({"width": 360, "height": 740})
    opened.goto(address + paths[page])
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360


def tab_order(page: Page, most: int = 60) -> list[str]:
    """What the Tab key reaches, in order: tag and name of each."""
    reached: list[str] = []
    for _ in range(most):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "() => { const e = document.activeElement;"
            " const name = e.name || e.id || e.textContent.trim();"
            " return e === document.body ? '' : `${e.tagName.toLowerCase()} ${name}`; }"
        )
        if not name:
            break
        reached.append(name)
    return reached


def test_the_keyboard_reaches_the_main_controls(context: BrowserContext, address: str, paths: dict[str, str]) -> None:
    page = open_page(context, address + paths["playground"] + "?lang=en")
    order = tab_order(page)
    assert order[0].startswith("a Skip")
    assert [item for item in order if item.startswith("a ")][1:4] == ["a Sihe 四合", "a Map", "a Runs"]
    for control in ("textarea prompt", "button send", "button clear", "input mode", "input temperature"):
        assert control in order
    page.goto(address + paths["models"])
    assert "summary Deploy a model" in tab_order(page)


def test_the_skip_link_leads_past_the_navigation(context: BrowserContext, address: str) -> None:
    page = open_page(context, f"{address}/runs?lang=en")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_shortcuts(context: BrowserContext, address: str) -> None:
    page = open_page(context, f"{address}/about?lang=en")
    page.keyboard.press("g")
    page.keyboard.press("r")
    page.wait_for_url("**/runs")
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    page.goto(f"{address}/search")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "q"
    page.keyboard.type("g r")  # typing is no shortcut
    assert page.url.endswith("/search")


def test_the_theme_changes_and_stays(context: BrowserContext, address: str) -> None:
    page = open_page(context, f"{address}/about")
    before = page.evaluate("getComputedStyle(document.body).color")
    page.keyboard.press("t")  # light
    page.keyboard.press("t")  # dark
    after = page.evaluate("getComputedStyle(document.body).color")
    assert after != before
    page.goto(f"{address}/runs")
    assert page.evaluate("getComputedStyle(document.body).color") == after


def test_a_curve_follows_a_run_that_goes_on(context: BrowserContext, address: str, house: Any) -> None:
    tracking = house.workspace.tracking
    run_id = tracking.start_run("labs", "goes on")
    try:
        tracking.log_steps(run_id, {step: {"loss": 3.0 - step} for step in range(2)})
        page = open_page(context, f"{address}/runs/{run_id}?lang=en")
        page.wait_for_selector("canvas")
        tracking.log_metrics(run_id, {"loss": 0.625}, step=2)
        expect(page.locator("[data-last]")).to_have_text("0.625")
        tracking.end_run(run_id)
        expect(page.locator("#run-status")).to_contain_text("Finished")
    finally:
        tracking.end_run(run_id)


def test_the_playground_streams_and_stops(context: BrowserContext, address: str) -> None:
    page = open_page(context, f"{address}/playground/chat?lang=en")
    expect(page.locator("#deployment-chat")).to_contain_text("Ready", timeout=60_000)
    page.fill("textarea", "the quick")
    page.fill("input[name=seed]", "1")
    page.fill("input[name=max_tokens]", "8")
    page.click("#send")
    expect(page.locator("#send")).to_be_enabled(timeout=20_000)
    assert page.locator("#trouble").inner_text() == ""
    assert "ms" in page.locator("#m-ttft").inner_text()
    assert page.locator("#m-finish").inner_text() in ("length", "stop")
    assert page.locator("#m-version").inner_text() == "tiny@1"
    page.fill("textarea", "a prompt that is longer than the context " * 30)
    page.click("#send")
    expect(page.locator("#send")).to_be_enabled(timeout=20_000)
    assert "context" in page.locator("#trouble").inner_text()
    page.fill("textarea", "the")
    page.fill("input[name=max_tokens]", "100")
    # Both at once: so small a model may be done before the browser's next action.
    page.evaluate("for (const id of ['send', 'stop']) document.getElementById(id).click()")
    expect(page.locator("#send")).to_be_enabled(timeout=20_000)
    stopped = page.locator("form[data-stopped]").get_attribute("data-stopped")
    assert stopped
    assert page.locator("#m-finish").inner_text() == stopped


def test_an_answer_leads_to_the_words_it_rests_on(context: BrowserContext, address: str) -> None:
    page = open_page(context, f"{address}/search?lang=en")
    page.fill("input[name=q]", "Why does ZeRO stage 3 cost communication?")
    page.keyboard.press("Enter")
    page.wait_for_selector("ol.sources")
    assert "q=Why" in page.url  # the address can be shared
    quote = page.locator("ol.sources q").first.inner_text()
    page.locator("ol.sources a").first.click()
    page.wait_for_selector("#cited")
    assert page.locator("#cited").inner_text() == quote


def test_filters_work_without_leaving_the_page(context: BrowserContext, address: str) -> None:
    page = open_page(context, f"{address}/coach?lang=en")
    everything = page.locator("#questions li").count()
    page.select_option("select[name=stars]", "5")
    page.wait_for_url("**stars=5**")
    expect(page.locator("#questions li")).not_to_have_count(everything)
    assert page.locator("#questions li").count() > 0
