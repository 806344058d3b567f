"""A request's page: its text as it comes, its tokens, and texts that would harm if they could."""

from __future__ import annotations

from playwright.sync_api import Page, Route, expect
from sqlalchemy import insert, update

from orchestrator.db import views
from orchestrator.db.tables import ChoiceRow, ChunkRow, JobRow, RequestRow
from tests.api.conftest import Api
from tests.dashboard.conftest import NewPage
from tests.dashboard.jobs import CANARY, HARM, STORY, SWEEP, UNSEEN, as_yaml, ended, submitted
from workers.loading.model import LoadedModel
from workers.process import local_worker


def test_text_arrives_while_the_page_is_open(api: Api, page: Page, tiny_model: LoadedModel) -> None:
    job_id = submitted(api, STORY)
    request_id = views.requests(api.db, job_id)[0].id

    def unchanged(route: Route) -> None:
        route.fulfill(status=304)

    # What the page asks for once more at the end is kept away: the text comes by the stream alone.
    page.route("**/choices?*", unchanged)
    page.goto(f"{api.url}/requests/{request_id}")
    expect(page.locator(".choice")).to_have_count(3)
    with local_worker(api.settings, api.db, api.queue, tiny_model):
        ended(api, job_id)
    expect(page.locator("#state")).to_have_text("succeeded")
    for choice in views.choices(api.db, request_id):
        shown = page.locator(f'[data-choice="{choice.choice}"] .text').text_content()
        assert choice.text and shown == choice.text


def test_a_stream_that_is_refused_is_told_and_asked_for_again(
    api: Api, new_page: NewPage, tiny_model: LoadedModel
) -> None:
    job_id = submitted(api, STORY)
    request_id = views.requests(api.db, job_id)[0].id
    page = new_page(expected="503")
    streams = "**/api/requests/*/stream"
    page.route(streams, lambda route: route.fulfill(status=503))
    page.route("**/choices?*", lambda route: route.fulfill(status=304))
    page.goto(f"{api.url}/requests/{request_id}")
    expect(page.locator("#lost")).to_be_visible()
    page.unroute(streams)
    expect(page.locator("#lost")).to_be_hidden()
    with local_worker(api.settings, api.db, api.queue, tiny_model):
        ended(api, job_id)
    expect(page.locator("#state")).to_have_text("succeeded")
    for choice in views.choices(api.db, request_id):
        shown = page.locator(f'[data-choice="{choice.choice}"] .text').text_content()
        assert choice.text and shown == choice.text


def test_tokens_are_coloured_and_say_what_else_was_likely(api_with_worker: Api, page: Page) -> None:
    api = api_with_worker
    job_id = submitted(api, SWEEP.format(name="sums"))
    ended(api, job_id)
    request_id = views.requests(api.db, job_id, points=[9])[0].id
    choice = views.choices(api.db, request_id)[0]
    entries = [entry for chunk in choice.chunks for entry in chunk.logprobs or []]
    page.goto(f"{api.url}/requests/{request_id}")
    tokens = page.locator('[data-choice="0"] .tk')
    expect(tokens).to_have_count(len(entries))
    assert "".join(tokens.all_text_contents()) == "".join(entry["token"] for entry in entries)

    hint = page.locator("#hint")
    tokens.nth(0).hover()
    expect(hint).to_be_visible()
    for other in entries[0]["top_logprobs"]:
        expect(hint).to_contain_text(other["token"].strip())
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(hint.locator("tr")).to_have_count(len(entries[1]["top_logprobs"]))
    page.get_by_role("button", name="Text").click()
    expect(page.locator('[data-choice="0"] .text')).to_have_text(choice.text or "")
    page.get_by_role("button", name="Tokens").click()
    expect(tokens.first).to_be_visible()


def test_texts_that_would_harm_are_shown_as_texts(api_with_worker: Api, new_page: NewPage) -> None:
    api = api_with_worker
    job_id = submitted(api, as_yaml(HARM))
    ended(api, job_id)
    request = views.requests(api.db, job_id)[0]
    said = CANARY + UNSEEN + "long " * 20_000
    entry = {"token": CANARY, "logprob": -1.0, "bytes": None}
    with api.db.write() as tx:  # what a model might say, and a name that no door lets in
        tx.execute(update(JobRow).where(JobRow.id == job_id).values(name=CANARY))
        ours = ChunkRow.request_id == request.id
        values = {"text": said, "logprobs": [{**entry, "top_logprobs": [entry]}], "n_tokens": 1}
        tx.execute(update(ChunkRow).where(ours, ChunkRow.token_start == 0).values(**values))
    page = new_page()
    paths = ["/", f"/jobs/{job_id}", f"/jobs/{job_id}/requests", f"/requests/{request.id}"]
    for path in paths:
        page.goto(api.url + path)
        page.wait_for_load_state("networkidle")
        assert CANARY in str(page.text_content("main"))
        assert page.locator("main img, main script").count() == 0
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
    assert CANARY in str(page.locator(".message .text").first.text_content())
    token = page.locator(".tk").first
    token.hover()
    expect(page.locator("#hint td").first).to_have_text(CANARY)
    text = str(page.locator(".message .text").nth(1).text_content())
    assert "\u202e" not in text and "U+202E" in text and "U+200B" in text and "\u2407" in text


def test_harmful_text_in_a_live_stream_stays_text(api: Api, page: Page) -> None:
    """Played by the server's own route over rows that a worker would write."""
    job_id = submitted(api, STORY)
    request_id = views.requests(api.db, job_id)[0].id
    page.goto(f"{api.url}/requests/{request_id}")
    with api.db.write() as tx:
        ours = RequestRow.id == request_id
        tx.execute(update(RequestRow).where(ours).values(state="running"))
        if not views.choices(api.db, request_id):
            tx.execute(insert(ChoiceRow).values(request_id=request_id, choice=0, n_tokens=1))
        row = {"request_id": request_id, "choice": 0, "token_start": 0, "n_tokens": 1}
        tx.execute(insert(ChunkRow).values(**row, token_ids=b"\0" * 4, text=CANARY + UNSEEN))
    text = page.locator('[data-choice="0"] .text')
    expect(text).to_contain_text("canary")
    assert str(text.text_content()).startswith(CANARY)
    assert "U+202E" in str(text.text_content())
    assert page.locator("main img").count() == 0
