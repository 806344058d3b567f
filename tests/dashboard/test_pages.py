"""Pages say what rows say, and their buttons do what they are called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import update

from orchestrator import lifecycle
from orchestrator.db import views
from orchestrator.db.tables import RequestRow
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from tests.api.conftest import Api
from tests.dashboard.conftest import NewPage
from tests.dashboard.jobs import STORY, SWEEP, ended, submitted


def test_without_jobs_the_page_says_how_to_make_one(api: Api, page: Page) -> None:
    page.goto(api.url)
    expect(page.get_by_role("heading", name="No jobs yet")).to_be_visible()
    page.get_by_role("link", name="Schedules").click()
    expect(page.get_by_role("heading", name="Nothing is scheduled")).to_be_visible()
    page.get_by_role("link", name="Workers").click()
    expect(page.get_by_role("heading", name="No worker is registered")).to_be_visible()


def test_jobs_are_listed_as_they_stand_and_while_they_run(api_with_worker: Api, page: Page) -> None:
    api = api_with_worker
    page.goto(api.url)
    job_id = submitted(api, STORY)  # after the page: it has to come by itself
    row = page.locator("tbody tr")
    expect(row.locator(".badge")).to_have_text("succeeded")
    status = ended(api, job_id)
    expect(row.get_by_role("link")).to_have_attribute("href", f"/jobs/{job_id}")
    bar = row.get_by_role("progressbar")
    expect(bar).to_have_attribute("aria-valuenow", str(status.succeeded))
    expect(bar).to_have_attribute("aria-valuemax", str(status.requests))


def test_filters_and_pages_of_jobs(api: Api, page: Page) -> None:
    for i in range(30):
        submitted(api, STORY.replace("name: story", f"name: story-{i}"))
    lifecycle.cancel(api.db, views.find_job(api.db, "story-3"))
    page.goto(api.url)
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(25)
    expect(rows.first.get_by_role("link")).to_have_text("story-29")
    page.get_by_role("link", name="Older").click()
    expect(rows).to_have_count(5)
    expect(rows.last.get_by_role("link")).to_have_text("story-0")
    page.get_by_role("link", name="Newest").click()
    page.get_by_label("State").select_option("cancelled")
    page.get_by_role("button", name="Filter").click()
    expect(rows.get_by_role("link")).to_have_text(["story-3"])
    page.get_by_label("Name").fill("no such job")
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_role("heading", name="No job is like that")).to_be_visible()


def test_a_job_says_its_counts_usage_source_and_events(api_with_worker: Api, page: Page) -> None:
    api = api_with_worker
    job_id = submitted(api, SWEEP.format(name="sums"))
    status = ended(api, job_id)
    page.goto(f"{api.url}/jobs/sums")  # by name
    expect(page.get_by_role("heading", level=1)).to_contain_text("sums")
    expect(page.locator(".counts .succeeded")).to_have_text(f"{status.succeeded} succeeded")
    facts = page.locator(".facts")
    expect(facts).to_contain_text(f"{status.completion_tokens:,}")
    expect(facts).to_contain_text(f"{status.prompt_tokens:,}")
    assert page.locator("pre.source").inner_text().strip() == SWEEP.format(name="sums").strip()
    page.get_by_text("Events").click()
    told = [event.event for event in views.events(api.db, job_id)]
    assert told and page.locator(".events li b").all_inner_texts() == told


def test_the_grid_has_the_means_of_the_points(api_with_worker: Api, page: Page) -> None:
    api = api_with_worker
    job_id = submitted(api, SWEEP.format(name="sums"))
    ended(api, job_id)
    page.goto(f"{api.url}/jobs/{job_id}")
    cells = page.locator("table.heat td")
    expect(cells).to_have_count(12)
    points = views.points_page(api.db, job_id, limit=100)
    means = {str(point.position): point.scores["correct"][0] for point in points}
    for cell in cells.all():
        position = str(cell.get_attribute("data-points"))
        assert float(str(cell.get_attribute("data-mean"))) == pytest.approx(means[position])
    expect(page.locator("#sweep .lines canvas")).to_be_visible()

    page.locator("select[name=measure]").select_option("length")
    expect(page.locator("table.heat")).to_have_attribute("data-measure", "length")
    page.locator("select[name=y]").select_option("")
    expect(cells).to_have_count(4)
    page.locator("select[name='at.seed']").select_option("2")
    held = [p for p in points if p.params["seed"] == 2 and p.params["temperature"] == 0]
    expect(cells.first).to_have_attribute("data-points", str(held[0].position))
    assert float(str(cells.first.get_attribute("data-mean"))) == pytest.approx(held[0].mean_tokens)

    cells.first.click()
    page.get_by_role("link", name="its requests").click()
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(2)
    assert page.url.endswith(f"point={held[0].position}")


def test_without_scripts_every_part_can_be_read(api_with_worker: Api, new_page: NewPage) -> None:
    api = api_with_worker
    job_id = submitted(api, SWEEP.format(name="sums"))
    ended(api, job_id)
    with api.db.write() as tx:
        failed = {"state": "failed", "error_code": "params", "error_message": "too long"}
        tx.execute(update(RequestRow).values(failed))
    page = new_page(java_script_enabled=False)
    page.goto(api.url)
    page.get_by_role("link", name="sums").click()
    page.get_by_role("link", name="The errors by themselves").click()
    expect(page.get_by_role("link", name="params")).to_be_visible()
    page.go_back()
    page.get_by_role("link", name="The grid by itself").click()
    expect(page.locator("table.heat td")).to_have_count(12)
    page.get_by_label("Down").select_option("")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("table.heat td")).to_have_count(4)


def test_errors_are_grouped_by_class(api: Api, page: Page) -> None:
    job_id = submitted(api, SWEEP.format(name="sums"))
    with api.db.write() as tx:
        ids = [r.id for r in views.requests(api.db, job_id)][:3]
        tx.execute(
            update(RequestRow)
            .where(RequestRow.id.in_(ids))
            .values(state="failed", error_code="poison", error_message="<b>no</b>")
        )
    page.goto(f"{api.url}/jobs/{job_id}")
    row = page.locator("#errors tbody tr")
    expect(row).to_contain_text("poison")
    expect(row.locator("td.n")).to_have_text("3")
    expect(row.locator(".told")).to_have_text("<b>no</b>")
    row.get_by_role("link", name="poison").click()
    expect(page.locator("tbody tr")).to_have_count(3)


def test_buttons_pause_resume_and_cancel_after_a_question(api: Api, page: Page) -> None:
    job_id = submitted(api, STORY)
    page.goto(f"{api.url}/jobs/{job_id}")
    badge = page.locator("h1 .badge")
    dialog = page.get_by_role("dialog")

    page.get_by_role("button", name="Pause").click()
    expect(dialog).to_contain_text("Pause this job?")
    dialog.get_by_role("button", name="Leave it").click()
    expect(dialog).to_be_hidden()
    assert views.job_status(api.db, job_id).state == "queued"

    for button, state in (("Pause", "paused"), ("Resume", "queued"), ("Cancel", "cancelled")):
        page.get_by_role("button", name=button).click()
        dialog.get_by_role("button", name=button).click()
        expect(badge).to_have_text(state)
        assert views.job_status(api.db, job_id).state == state
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)


def test_a_refusal_is_told_in_the_dialog(api: Api, new_page: NewPage) -> None:
    job_id = submitted(api, STORY)
    page = new_page(expected="409")
    page.goto(f"{api.url}/jobs/{job_id}")
    page.get_by_role("button", name="Pause").click()
    lifecycle.cancel(api.db, job_id)
    page.get_by_role("dialog").get_by_role("button", name="Pause").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text(job_id)


def test_a_job_says_why_it_waits(api: Api, page: Page) -> None:
    job_id = submitted(api, STORY)
    page.goto(f"{api.url}/jobs/{job_id}")
    reason = views.waiting(api.db, job_id).reasons[0]
    expect(page.locator("#waiting")).to_contain_text(reason)


def test_workers_are_shown(api_with_worker: Api, page: Page) -> None:
    page.goto(f"{api_with_worker.url}/workers")
    row = page.locator("tbody tr").first
    expect(row).to_contain_text("tiny")
    expect(row.locator(".badge")).to_have_text("alive")


@pytest.mark.parametrize(
    ("path", "status"), [("/jobs/none", 404), ("/no/page", 404), ("/requests/x", 400)]
)
def test_what_is_not_there_is_a_page_too(api: Api, path: str, status: int) -> None:
    answer = api.http.get(path, headers={"accept": "text/html"})
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert "<h1>" in answer.text and "Traceback" not in answer.text


def test_a_part_that_is_the_same_is_not_sent_again(api: Api) -> None:
    job_id = submitted(api, STORY)
    for path in ("/?part=true", f"/jobs/{job_id}/status", f"/jobs/{job_id}/errors"):
        first = api.http.get(path)
        again = api.http.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
    tag = api.http.get(f"/jobs/{job_id}/status").headers["etag"]
    lifecycle.pause(api.db, job_id)
    changed = api.http.get(f"/jobs/{job_id}/status", headers={"if-none-match": tag})
    assert changed.status_code == 200 and "paused" in changed.text


def test_pages_load_nothing_from_elsewhere_and_nothing_inline(api: Api) -> None:
    job_id = submitted(api, SWEEP.format(name="sums"))
    for path in ("/", f"/jobs/{job_id}", "/workers", "/schedules", f"/jobs/{job_id}/grid"):
        text = api.http.get(path).text
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
        assert not re.search(r"<script(?![^>]*\ssrc=\"/static/)", text)
        assert not re.search(r"(?:src|href|action)=\"(?!/|#|\?|https?://127)", text)
        for address in set(re.findall(r"\"(/static/[^\"]+)\"", text)):
            answer = api.http.get(address)
            assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]


def test_signing_in_and_out(keyed_api: Api, new_page: NewPage) -> None:
    api = keyed_api
    key = api.key("ada")
    page = new_page()
    page.goto(f"{api.url}/workers")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Workers")).to_be_visible()
    cookie = page.context.cookies()[0]
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert page.context.cookies() == []


@pytest.mark.parametrize("next", ["//evil.example", "https://evil.example/", "/\\evil.example"])
def test_signing_in_leads_to_no_other_site(keyed_api: Api, next: str) -> None:
    http = keyed_api.http
    form = http.get("/login", params={"next": next}).text
    assert 'name="next" value="/"' in form
    token = re.search(r'name="csrf_token" value="([^"]+)"', form)
    assert token
    given = {"csrf_token": token[1], "key": keyed_api.key("ada"), "next": next}
    answer = http.post("/login", data=given)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


def test_a_wrong_key_is_refused(keyed_api: Api) -> None:
    http = keyed_api.http
    token = re.search(r'name="csrf_token" value="([^"]+)"', http.get("/login").text)
    assert token
    answer = http.post("/login", data={"csrf_token": token[1], "key": "psk_wrong"})
    assert answer.status_code == 403 and "set-cookie" not in answer.headers
    assert "psk_wrong" not in answer.text
    assert http.post("/login", data={"key": keyed_api.key("ada")}).status_code == 403


def test_jobs_of_others_do_not_exist(keyed_api: Api) -> None:
    api = keyed_api
    made = plan(parse_job(STORY, file="job.yaml", root=Path.cwd()))
    job_id = lifecycle.submit(api.db, made, api.queue, owner="bob")
    request_id = views.requests(api.db, job_id)[0].id
    mine, theirs = api.bearer("bob"), api.bearer("ada")
    parts = ("", "/status", "/waiting", "/grid", "/errors", "/requests")
    paths = [f"/jobs/{job_id}{part}" for part in parts]
    paths += [f"/requests/{request_id}{part}" for part in ("", "/choices", "/state", "/tokens")]
    for path in paths:
        assert api.http.get(path, headers=mine).status_code == 200, path
        assert api.http.get(path, headers=theirs).status_code == 404, path
    assert "story" not in api.http.get("/", headers=theirs).text
    assert "story" in api.http.get("/", headers=mine).text
