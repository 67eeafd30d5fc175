"""Makes the pictures of docs/serve.md from a server that runs: headless Chromium asks it real questions.

    puna ui smollm2-135m-instruct --companion draft=runs/smollm2-draft/draft/model --runs runs
    python -m tests.serve.pictures http://127.0.0.1:8000 docs

Look at what it made before it is committed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.serve.chromium import launch

CHAT, COMPARE = (
    "Why do llamas live in the high Andes?",
    "What is the capital of Peru, and what is it known for?",
)


def chat(page: Any) -> None:
    """An answer coloured by entropy."""
    page.fill("#max-tokens", "80")
    page.fill("#chat-input", CHAT)
    page.press("#chat-input", "Enter")
    page.wait_for_selector(".said.assistant .foot", timeout=120_000)
    page.select_option("#chat-colouring", "entropy")


def compare(page: Any) -> None:
    """The same model decoded plainly and with drafts, coloured by acceptance."""
    page.fill("#max-tokens", "80")
    page.click("a[data-view=compare]")
    page.select_option("#side-right-strategy", "speculative")
    page.fill("#compare-input", COMPARE)
    page.click("#compare-send")
    page.wait_for_selector("#verdict:not(:empty)", timeout=120_000)
    page.select_option("#compare-colouring", "acceptance")


def runs(page: Any) -> None:
    """The list of runs."""
    page.click("a[data-view=runs]")
    page.wait_for_selector("#runs-table tbody tr")


PICTURES = {
    "serve-chat": (chat, "light", 680),
    "serve-compare": (compare, "dark", 860),
    "serve-runs": (runs, "light", 480),
}


def main(url: str, folder: Path) -> int:
    """Make each picture; 1 if there is no Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = launch(driver)
        if browser is None:
            print("no Chromium: python -m tests.serve.chromium fetches one", file=sys.stderr)
            return 1
        for name, (show, scheme, height) in PICTURES.items():
            page = browser.new_page(viewport={"width": 1120, "height": height}, color_scheme=scheme)
            page.goto(f"{url}/ui/")
            page.wait_for_selector("body[data-ready]")
            show(page)
            page.mouse.move(0, 0)
            page.screenshot(path=folder / f"{name}.png")
            page.close()
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
