"""A real browser at the real server: a page whose every error in the console fails the test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.api.conftest import (  # noqa: F401 (fixtures)
    api,
    api_settings,
    api_with_worker,
    keyed_api,
    tiny_model,
)
from tests.dashboard.browser import find_browser

NewPage = Callable[..., Page]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Headless chromium."""
    found = find_browser()
    if found is None:
        reason = "no chromium here: make browser"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    options: dict[str, Any] = (
        {"env": {**os.environ, **found.environment}} if found.environment else {}
    )
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=found.path, args=arguments, **options)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Browser) -> Iterator[NewPage]:
    """Opens pages, each in a context of its own; options are those of a context.

    `expected`: an error in the console with these words is meant to be there.
    """
    contexts: list[BrowserContext] = []
    faults: list[str] = []

    def opened(expected: str | None = None, **options: Any) -> Page:
        def fault(words: str) -> None:
            if expected is None or expected not in words:
                faults.append(words)

        given = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options
        context = chromium.new_context(**given)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: fault(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: fault(f"uncaught: {error}"))
        page.on("dialog", lambda dialog: fault(f"a dialog opened: {dialog.message}"))
        page.set_default_timeout(20_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def page(new_page: NewPage) -> Page:
    """One page, wide and light."""
    return new_page(color_scheme="light")
