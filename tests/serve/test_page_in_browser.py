"""The page in a real browser: headless Chromium, where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.chromium import launch
from tests.serve.little_server import Live, live, slowed, tiny_catalog
from tests.serve.test_page import make_run

playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = launch(driver)
        if found is None:
            pytest.skip("no Chromium: python -m tests.serve.chromium fetches one")
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    runs = tmp_path_factory.mktemp("runs")
    make_run(runs / "first", title="<img src=x onerror=alert(1)>")
    with live(slowed(tiny_catalog(tiny_tokenizer, "tiny", "other"), 0.01), page=True, runs=runs) as found:
        yield found


@pytest.fixture
def page(browser: Any, server: Live) -> Iterator[Any]:
    """The page, opened; a word on its console or a request to elsewhere fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    opened = context.new_page()
    said: list[str] = []
    refused = "Failed to load resource"  # what Chromium says of an answer of 400, which the page tells itself
    opened.on("console", lambda message: message.text.startswith(refused) or said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda asked: asked.url.startswith(server.url) or said.append(asked.url))
    opened.goto(f"{server.url}/ui/")
    opened.wait_for_selector("body[data-ready]")
    yield opened
    context.close()
    assert said == []


def test_a_conversation_goes_on_and_can_be_coloured(page: Any, server: Live) -> None:
    page.fill("#max-tokens", "8")
    page.fill("#chat-input", "the cat")
    page.press("#chat-input", "Enter")
    page.wait_for_selector(".said.assistant .foot")
    said = page.text_content(".said.assistant .text")
    asked = [{"role": "user", "content": "the cat"}]
    body = {"model": "tiny", "messages": asked, "temperature": 0, "max_tokens": 8}
    expected = server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]
    assert said == expected
    page.select_option("#chat-colouring", "entropy")
    tokens = page.query_selector_all(".said.assistant .token")
    assert len(tokens) == 8
    assert "".join(token.text_content() for token in tokens) == expected
    assert "bits of entropy" in tokens[0].get_attribute("title")
    assert {token.get_attribute("class").split()[1] for token in tokens} <= {
        f"h{level}" for level in range(6)
    }
    page.select_option("#chat-colouring", "source")
    assert "target" in page.text_content("#chat-colour .legend")
    page.fill("#chat-input", "on that mat")
    page.click("#chat-send")
    page.wait_for_selector(".said.assistant:nth-of-type(4) .foot")
    asked += [{"role": "assistant", "content": expected}, {"role": "user", "content": "on that mat"}]
    expected = server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]
    assert page.text_content(".said.assistant:nth-of-type(4) .text") == expected
    page.click("#chat-clear")
    assert page.query_selector_all(".said") == []


def test_stopping_an_answer_stops_the_engine(page: Any, server: Live) -> None:
    page.fill("#max-tokens", "1800")
    page.fill("#chat-input", "the cat")
    page.press("#chat-input", "Enter")
    page.wait_for_selector("#chat-stop:visible")
    page.wait_for_selector(".said.assistant .text:not(:empty)")
    page.click("#chat-stop")
    page.wait_for_selector(".said.assistant .foot")
    assert server.settled()
    assert "stopped" in page.text_content(".said.assistant .foot")


def test_two_models_are_compared(page: Any) -> None:
    page.fill("#max-tokens", "6")
    page.click("a[data-view=compare]")
    page.fill("#compare-input", "the cat")
    page.click("#compare-send")
    page.wait_for_selector("#verdict:not(:empty)")
    assert page.input_value("#side-left-model") == "tiny"
    assert page.input_value("#side-right-model") == "other"
    assert "go apart at token 1" in page.text_content("#verdict")
    assert len(page.query_selector_all(".token.apart")) == 2
    page.select_option("#side-right-model", "tiny")
    page.click("#compare-send")
    page.wait_for_selector("#verdict:has-text('the same')")
    page.click("#side-left summary")
    assert len(page.query_selector_all("#side-left details tbody tr")) == 6


def test_what_models_and_runs_say_is_never_markup(page: Any) -> None:
    page.fill("#max-tokens", "2")
    page.fill("#chat-input", "<img src=x onerror=alert(1)>")
    page.press("#chat-input", "Enter")
    page.wait_for_selector(".said.assistant .foot")
    assert page.text_content(".said.user .text") == "<img src=x onerror=alert(1)>"
    page.click("a[data-view=runs]")
    page.wait_for_selector("#runs-table tbody tr")
    assert page.query_selector_all("main img, main script") == []
    assert "<img" in page.text_content("#runs-table")
    with page.context.expect_page() as opened:
        page.click("#runs-table a")
    opened.value.wait_for_load_state()
    assert opened.value.text_content("p") == "report"


def test_strategies_that_lack_something_are_not_offered(page: Any) -> None:
    offered = page.locator("#chat-strategy option").all_text_contents()
    assert "best-of" in offered and "speculative" not in offered and "specdec-pp" not in offered
    page.click(".lacking summary")
    assert "--companion draft=MODEL" in page.text_content(".lacking")
    page.select_option("#chat-strategy", "best-of")
    page.fill("#chat-settings", '{"samples": 2}')
    page.fill("#max-tokens", "4")
    page.fill("#chat-input", "the cat")
    page.press("#chat-input", "Enter")
    page.wait_for_selector(".said.assistant .foot")
    assert "best-of" in page.text_content(".said.assistant .who")


def test_mistakes_are_shown_and_the_question_is_kept(page: Any) -> None:
    page.fill("#max-tokens", "1000000")
    page.fill("#chat-input", "the cat")
    page.press("#chat-input", "Enter")
    page.wait_for_selector("#problem:visible")
    assert "beyond this server's bound" in page.text_content("#problem")
    assert page.input_value("#chat-input") == "the cat"
    assert page.query_selector_all(".said") == []


def test_the_theme_follows_the_reader(browser: Any, server: Live, page: Any) -> None:
    def background(opened: Any) -> str:
        return str(opened.locator("body").evaluate("body => getComputedStyle(body).backgroundColor"))

    light = background(page)
    page.click("#theme")
    page.click("#theme")
    assert page.text_content("#theme") == "Theme: dark"
    assert background(page) != light


def test_every_control_has_a_name(page: Any) -> None:
    """What a screen reader calls each control; and headings, landmarks, language."""
    unnamed = page.locator("button, input, select, textarea, a").evaluate_all(
        """controls => controls
           .filter(control => !(control.labels?.length || control.textContent.trim() || control.ariaLabel))
           .map(control => control.id || control.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("main").count() == page.locator("nav").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"


def test_a_key_is_asked_for(browser: Any, tiny_tokenizer: Any) -> None:
    with live(tiny_catalog(tiny_tokenizer), page=True, api_key="secret") as guarded:
        context = browser.new_context()
        opened = context.new_page()
        opened.goto(f"{guarded.url}/ui/")
        opened.wait_for_selector("#key-dialog[open]")
        opened.fill("#key-input", "secret")
        opened.press("#key-input", "Enter")
        opened.wait_for_selector("body[data-ready]")
        context.close()


def test_it_can_be_read_on_a_narrow_screen(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 720})
    for view in ("chat", "compare", "runs"):
        page.click(f"a[data-view={view}]")
        width = page.locator("html").evaluate("html => html.scrollWidth")
        assert width <= 360, view
