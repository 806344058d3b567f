"""Pages by keyboard, on a phone, in the dark; `DASHBOARD_SHOTS=folder` keeps pictures of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from orchestrator.db import views
from tests.api.conftest import Api
from tests.dashboard.conftest import NewPage
from tests.dashboard.jobs import STORY, SWEEP, ended, submitted

LOOKS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 740}},
}


@pytest.fixture
def served(api_with_worker: Api) -> Api:
    """With a sweep and a story that have ended."""
    for yaml in (STORY, SWEEP.format(name="sums")):
        ended(api_with_worker, submitted(api_with_worker, yaml))
    return api_with_worker


def paths(api: Api) -> dict[str, str]:
    sums = views.find_job(api.db, "sums")
    story = views.find_job(api.db, "story")
    return {
        "jobs": "/",
        "job": f"/jobs/{sums}",
        "requests": f"/jobs/{sums}/requests",
        "request": f"/requests/{views.requests(api.db, sums, points=[9])[0].id}",
        "story": f"/requests/{views.requests(api.db, story)[0].id}",
        "workers": "/workers",
        "schedules": "/schedules",
        "missing": "/jobs/none",
    }


@pytest.mark.parametrize("look", LOOKS)
def test_no_page_is_wider_than_the_screen(served: Api, new_page: NewPage, look: str) -> None:
    page = new_page(**LOOKS[look])
    for name, path in paths(served).items():
        if name == "missing":
            continue  # its 404 is an error in the console
        page.goto(served.url + path)
        page.wait_for_load_state("networkidle")
        keep(page, f"{name}-{look}")
        over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert over <= 0, f"{name} is {over} pixels too wide"
        # A card would cut off what does not fit, which is no better.
        cut = page.locator(".card").evaluate_all(
            "all => all.filter((each) => each.scrollWidth > each.clientWidth).length"
        )
        assert cut == 0, f"{name} has {cut} cards that cut something off"


def keep(page: Page, name: str) -> None:
    """A picture for people to look at, where one was asked for."""
    if folder := os.environ.get("DASHBOARD_SHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_dark_is_dark_and_readable(served: Api, new_page: NewPage) -> None:
    luminance = """() => {
      const of = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
        .map((v) => v / 255).map((v) => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const style = getComputedStyle(document.body);
      return [of(style.backgroundColor), of(style.color)];
    }"""
    for scheme, darker in (("light", 1), ("dark", 0)):
        page = new_page(color_scheme=scheme)
        page.goto(served.url)
        both = page.evaluate(luminance)
        assert both.index(min(both)) == darker
        assert (max(both) + 0.05) / (min(both) + 0.05) > 7


# The least contrast of each kind of text, colours as they are painted; every step of each scale.
CONTRASTS = """() => {
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (...colours) => {
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((v) => v / 255)
    .map((v) => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = getComputedStyle(document.querySelector(".card")).backgroundColor;
  const row = document.querySelector("table.heat tbody tr");
  const made = (name, className, holder) => {
    const each = document.createElement(name);
    each.className = className;
    holder.append(each);
    const style = getComputedStyle(each);
    const behind = over(ground, style.backgroundColor);
    const ink = over(`rgb(${behind})`, style.color);
    const [low, high] = [light(behind), light(ink)].sort((a, b) => a - b);
    each.remove();
    return [className, (high + .05) / (low + .05)];
  };
  const states = ["queued", "running", "succeeded", "failed", "cancelled", "paused", "partial"];
  return [
    ...states.map((state) => made("span", `badge ${state}`, document.querySelector("h1"))),
    ...[...Array(11).keys()].map((step) => made("td", `h${step}`, row)),
    ...[...Array(6).keys()].map((step) => made("span", `tk p${step}`, row.parentElement)),
  ];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_on_colours_can_be_read(served: Api, new_page: NewPage, scheme: str) -> None:
    page = new_page(color_scheme=scheme)
    page.goto(f"{served.url}/jobs/sums")
    expect(page.locator("table.heat td")).to_have_count(12)
    found = page.evaluate(CONTRASTS)
    assert len(found) == 24
    assert [each for each in found if each[1] < 4.5] == []


def test_what_is_printed_is_whole_and_without_buttons(served: Api, page: Page) -> None:
    page.goto(f"{served.url}/jobs/sums")
    page.emulate_media(media="print")
    expect(page.locator("nav").first).to_be_hidden()
    source = page.locator("pre.source")
    assert source.evaluate("each => each.scrollHeight <= each.clientHeight")
    page.goto(f"{served.url}{paths(served)['request']}")
    expect(page.locator(".switch")).to_be_hidden()


def test_the_whole_way_by_keyboard(served: Api, page: Page) -> None:
    page.goto(served.url)
    press = page.keyboard.press
    press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    press("Enter")
    link = page.get_by_role("link", name="sums")
    for _ in range(20):
        press("Tab")
        if link.evaluate("each => each === document.activeElement"):
            break
    expect(link).to_be_focused()
    outline = link.evaluate("each => getComputedStyle(each).outlineStyle")
    assert outline == "solid"
    press("Enter")
    cells = page.locator("table.heat td")
    expect(cells).to_have_count(12)
    for _ in range(40):
        press("Tab")
        if cells.first.evaluate("each => each === document.activeElement"):
            break
    expect(cells.first).to_be_focused()
    for key, place in (("ArrowRight", 1), ("ArrowDown", 5), ("ArrowLeft", 4), ("End", 7)):
        press(key)
        expect(cells.nth(place)).to_be_focused()
    expect(page.locator("#cell-said")).to_contain_text("temperature 2, seed 2")
    press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Requests")
