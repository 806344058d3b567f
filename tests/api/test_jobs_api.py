"""The status API tells of a job what its rows say, to those who may see it."""

import json
import os
import random
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.finished import finished, pages
from orchestrator.db.store import Claimed, Origin, UsageWrite
from orchestrator.export import line
from orchestrator.spec.prices import Price, Prices
from tests.api.chatting import until
from tests.api.conftest import Api, api_at, settings_in
from tests.orchestrator.db.builders import claim_some, rows, run, small_plan, write

SEED = int(os.environ.get("API_SEED", random.SystemRandom().randrange(2**31)))
DOCS = Path(__file__).parents[2] / "docs" / "api.md"
OUTCOMES = ("succeeded", "failed", "cancelled")


def end(db: Database, claimed: Claimed, outcome: str = "succeeded") -> None:
    """The request's two tokens and its end."""
    error = ("boom", "it broke") if outcome == "failed" else None
    spent = UsageWrite(5, 2, 2, 0)
    made = write(
        claimed, 0, (1, 2), "ab", end="stop", whole="ab", outcome=outcome, error=error, usage=spent
    )
    assert not store.flush(db, [made], lease_seconds=60).lost


def get(api: Api, path: str, **query: Any) -> Any:
    answer = api.http.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def walked(api: Api, path: str, **query: Any) -> list[Any]:
    """All of a list, page by page."""
    found, after = [], None
    while True:
        page = get(api, path, **query, **({} if after is None else {"after": after}))
        found += page["data"]
        if (after := page["next"]) is None:
            return found


def test_a_job_is_told_as_its_rows_are(api: Api) -> None:
    job_id = store.insert_job(api.db, small_plan(3))
    claims = claim_some(api.db, 4)
    for claimed, outcome in zip(claims, ("succeeded", "failed", "succeeded"), strict=False):
        end(api.db, claimed, outcome)
    told = get(api, f"/api/jobs/{job_id}")
    counts = [told[name] for name in ("requests", "queued", "running", "succeeded", "failed")]
    assert counts == [6, 2, 1, 2, 1]
    assert told["usage"] == {
        "prompt_tokens": 15,
        "cached_tokens": 6,
        "completion_tokens": 6,
        "replayed_tokens": 0,
    }
    assert (told["state"], told["cost"], told["kind"]) == ("running", None, "job")
    assert told["waiting"] == ["no live worker serves model tiny"]
    assert told["version"] == views.version(api.db, job_id)
    for given in (job_id, "small", job_id[:12]):
        assert get(api, f"/api/jobs/{given}")["id"] == job_id
    (group,) = get(api, f"/api/jobs/{job_id}/errors")["data"]
    assert (group["code"], group["count"], group["request_id"]) == ("boom", 1, claims[1].request_id)
    assert [each["event"] for each in walked(api, f"/api/jobs/{job_id}/events", limit=1)] == [
        each.event for each in views.events(api.db, job_id)
    ]
    source = api.http.get(f"/api/jobs/{job_id}/source")
    assert source.text == views.job(api.db, job_id).source
    assert source.headers["content-type"].startswith("application/yaml")


def test_a_price_makes_a_cost(api: Api) -> None:
    prices = Prices("EUR", {"tiny": Price(prompt=1.0, cached=0.5, completion=2.0)})
    object.__setattr__(api.app.state.context, "prices", prices)
    job_id = store.insert_job(api.db, small_plan(1, (0,)))
    end(api.db, claim_some(api.db)[0])
    cost = get(api, f"/api/jobs/{job_id}")["cost"]
    assert cost == {"amount": (3 * 1.0 + 2 * 0.5 + 2 * 2.0) / 1e6, "currency": "EUR"}


def test_what_has_not_changed_is_not_sent_again(api: Api) -> None:
    job_id = store.insert_job(api.db, small_plan(1, (0,)))
    first = api.http.get(f"/api/jobs/{job_id}")
    known = {"if-none-match": first.headers["etag"]}
    second = api.http.get(f"/api/jobs/{job_id}", headers=known)
    assert (second.status_code, second.content) == (304, b"")
    assert second.headers["etag"] == first.headers["etag"]
    end(api.db, claim_some(api.db)[0])
    third = api.http.get(f"/api/jobs/{job_id}", headers=known)
    assert third.status_code == 200 and third.json()["state"] == "succeeded"


@pytest.mark.parametrize(
    "path", ["", "/points", "/requests", "/errors", "/events", "?wait=0", "/../../models"]
)
def test_a_list_of_tags_is_read_as_one(api: Api, path: str) -> None:
    job_id = store.insert_job(api.db, small_plan(1, (0,)))
    url = f"/api/jobs/{job_id}{path}"
    tag = api.http.get(url).headers["etag"]
    strong = tag.removeprefix("W/")
    for known in (tag, strong, "*", f'"x", {tag},W/"y"'):
        assert api.http.get(url, headers={"if-none-match": known}).status_code == 304, known
    for other in ('"x"', strong.strip('"'), f'"{strong.strip(chr(34))}x"', ""):
        assert api.http.get(url, headers={"if-none-match": other}).status_code == 200, other


def test_a_query_that_no_route_knows_is_refused(api: Api) -> None:
    store.insert_job(api.db, small_plan(1, (0,)))
    for path in ("/api/jobs", "/api/workers", "/api/jobs/small/results", "/api/jobs/small/cancel"):
        send = api.http.post if path.endswith("cancel") else api.http.get
        refused = send(path, params={"stat": "failed"})
        assert refused.status_code == 400, path
        error = refused.json()["error"]
        assert (error["param"], error["code"]) == ("stat", "unknown_parameter")
    assert "state" in api.http.get("/api/jobs?stat=x").json()["error"]["message"]


def test_what_a_query_had_is_told(api: Api) -> None:
    error = api.http.get("/api/jobs", params={"limit": "many"}).json()["error"]
    assert error["param"] == "limit" and error["message"].endswith("got 'many'.")


def test_a_change_is_waited_for(api: Api) -> None:
    job_id = store.insert_job(api.db, small_plan(1, (0,)))
    before = get(api, f"/api/jobs/{job_id}")["version"]
    same = get(api, f"/api/jobs/{job_id}", wait=1)
    assert same["version"] == before
    timer = threading.Timer(0.3, claim_some, [api.db])
    timer.start()
    told = get(api, f"/api/jobs/{job_id}", wait=60, version=before)
    timer.join()
    assert told["state"] == "running" and told["version"] != before
    assert get(api, f"/api/jobs/{job_id}", wait=60, version=before)["state"] == "running"


def test_jobs_are_listed_page_by_page_and_filtered(api: Api) -> None:
    made = [
        store.insert_job(api.db, small_plan(1, (0,), name=f"n{i % 3}", model=f"m{i % 2}"))
        for i in range(7)
    ]
    for limit in (1, 3, 7, 100):
        assert [each["id"] for each in walked(api, "/api/jobs", limit=limit)] == made[::-1]
    store.cancel_job(api.db, made[2], "why")
    assert [each["id"] for each in walked(api, "/api/jobs", state="cancelled")] == [made[2]]
    both = walked(api, "/api/jobs", state=["cancelled", "queued"], limit=2)
    assert len(both) == 7
    assert [each["name"] for each in walked(api, "/api/jobs", name="n1")] == ["n1"] * 2
    assert len(walked(api, "/api/jobs", model="m1", name="n0")) == 1
    assert walked(api, "/api/jobs", kind="batch") == []
    first = views.job(api.db, made[0]).created_at.isoformat()
    assert len(walked(api, "/api/jobs", since=first)) == 7
    assert walked(api, "/api/jobs", until=first) == []
    assert walked(api, "/api/jobs", since="9999-12-31T23:59:59-14:00") == []
    assert len(walked(api, "/api/jobs", since="0001-01-01T00:00:00+14:00")) == 7


def test_a_job_is_steered(api: Api) -> None:
    job_id = store.insert_job(api.db, small_plan(2, (0,)))
    path = f"/api/jobs/{job_id}"
    assert api.http.post(f"{path}/pause").json()["state"] == "paused"
    assert api.http.post(f"{path}/resume").json()["state"] == "queued"
    first, _ = claim_some(api.db)
    end(api.db, first, "failed")
    retried = api.http.post(f"{path}/retry").json()
    assert (retried["retried"], retried["job"]["queued"]) == (1, 1)
    cancelled = api.http.post(f"{path}/cancel", json={"reason": "enough"}).json()
    assert (cancelled["queued"], cancelled["cancelled"]) == (0, 1)
    assert cancelled["cancel_reason"] == "enough"
    refused = api.http.post(f"{path}/retry")
    assert refused.status_code == 409 and refused.headers["x-should-retry"] == "false"
    assert api.http.post(f"{path}/cancel", json={"why": "x"}).status_code == 400


def test_points_and_requests_are_listed_page_by_page(api: Api) -> None:
    job_id = store.insert_job(api.db, small_plan(3, (0, 0.5, 1)))
    claims = claim_some(api.db, 3)
    end(api.db, claims[0])
    end(api.db, claims[1], "failed")
    points = walked(api, f"/api/jobs/{job_id}/points", limit=2)
    assert [each["params"] for each in points] == [{"temperature": t} for t in (0, 0.5, 1)]
    assert sum(each["completion_tokens"] for each in points) == 4
    path = f"/api/jobs/{job_id}/requests"
    every = walked(api, path, limit=2)
    assert [each["id"] for each in every] == [each.id for each in views.requests(api.db, job_id)]
    assert [each["id"] for each in walked(api, path, state="failed")] == [claims[1].request_id]
    assert [each["id"] for each in walked(api, path, error_code="boom")] == [claims[1].request_id]
    assert len(walked(api, path, finish_reason="stop")) == 2
    assert len(walked(api, path, point=[0, 2], limit=4)) == 6
    assert len(walked(api, path, state="queued", point=1)) == 2


def test_results_come_in_the_order_of_ending_and_go_on_anywhere(db: Database) -> None:
    print(f"API_SEED={SEED}")
    dice = random.Random(SEED)
    job_id = store.insert_job(db, small_plan(10))
    open_ones, ended, read = claim_some(db, 20), list[int](), list[int]()
    dice.shuffle(open_ones)
    while open_ones:
        for _ in range(dice.randrange(4)):
            if open_ones:
                claimed = open_ones.pop()
                ended.append(claimed.request_id)
                end(db, claimed, dice.choice(OUTCOMES))
        after = read[-1] if read else None
        read += [each.request_id for each in finished(db, job_id, after=after, page=3)]
    read += [each.request_id for each in finished(db, job_id, after=read[-1] if read else None)]
    assert sorted(read) == sorted(ended)
    if db.dialect == "postgresql":  # whose clock tells each of them apart
        assert read == ended
    for known in (0, 7, 19):
        rest = [each.request_id for each in finished(db, job_id, after=read[known], page=4)]
        assert rest == read[known + 1 :]


def test_those_that_ended_at_once_come_in_the_order_of_the_plan(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(5))
    for claimed in claim_some(db):
        end(db, claimed)
    run(db, "UPDATE requests SET finished_at = (SELECT max(finished_at) FROM requests)")
    found = [each.request_id for each in finished(db, job_id, page=3)]
    assert found == [each.id for each in views.requests(db, job_id)] and len(found) == 10


def test_what_ended_but_is_not_seen_yet_holds_back_what_ended_later(
    postgresql_db: Database,
) -> None:
    db = postgresql_db
    job_id = store.insert_job(db, small_plan(3, (0,)))
    slow, fast, _ = claim_some(db)
    with db.write() as tx:
        tx.exec_driver_sql(
            "UPDATE requests SET state = 'succeeded', finished_at = clock_timestamp()"
            f" WHERE id = {slow.request_id}"
        )
        end(db, fast)
        assert list(finished(db, job_id)) == []
    run(db, "SELECT pg_sleep(0.15)")
    found = [each.request_id for each in finished(db, job_id)]
    assert found == [slow.request_id, fast.request_id]


def test_results_are_the_lines_of_an_export(api: Api) -> None:
    job_id = store.insert_job(api.db, small_plan(12, (0, 1)))
    claims = claim_some(api.db)
    for claimed in reversed(claims):
        end(api.db, claimed)
    answer = api.http.get(f"/api/jobs/{job_id}/results")
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(each) for each in answer.text.split("\n")[:-1]]
    exported = {each.request_id: line(each) for each in views.results(api.db, job_id)}
    assert {each["request_id"]: each for each in lines} == exported
    rest = api.http.get(f"/api/jobs/{job_id}/results", params={"after": lines[9]["request_id"]})
    assert rest.text == "".join(f"{each}\n" for each in answer.text.split("\n")[10:-1])
    run(api.db, f"UPDATE requests SET finished_at = NULL WHERE id = {lines[3]['request_id']}")
    for after, status in ((lines[3]["request_id"], 409), (5, 404)):
        refused = api.http.get(f"/api/jobs/{job_id}/results", params={"after": after})
        assert refused.status_code == status


def test_a_request_that_is_tried_again_meanwhile_cuts_nothing_off(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(4, (0,)))
    claims = claim_some(db)
    for claimed in claims:
        end(db, claimed, "failed")
    some = pages(db, job_id, None, over=True, page=2)
    first, place = next(some)
    run(
        db,
        f"UPDATE requests SET finished_at = NULL, state = 'queued' WHERE id = {place.request_id}",
    )
    rest = [each.request_id for page, _ in some for each in page]
    told = [each.request_id for each in first] + rest
    assert sorted(told) == sorted(each.request_id for each in claims)


def test_results_are_followed_to_the_end_and_no_further(db: Database, tmp_path: Path) -> None:
    job_id = store.insert_job(db, small_plan(15, (0,)))
    claims, told = claim_some(db), list[int]()
    first, *open_ones = claims
    with api_at(db, settings_in(tmp_path)) as api:
        url = f"/api/jobs/{job_id}/results"
        end(db, first)
        with api.http.stream("GET", url, params={"follow": "true"}) as answer:
            for text in answer.iter_lines():
                told.append(json.loads(text)["request_id"])
                if open_ones:  # only now: what is told was told while others were still open
                    end(db, open_ones.pop())
        assert sorted(told) == sorted(each.request_id for each in claims)
        known = {"follow": "true", "after": told[6]}
        rest = api.http.get(url, params=known).text.splitlines()
        assert [json.loads(each)["request_id"] for each in rest] == told[7:]
        assert api.http.get(url).text == api.http.get(url, params={"follow": "1"}).text
        until(lambda: api.app.state.streams.open == api.app.state.context.tails.followed == 0)


def test_who_leaves_what_they_follow_leaves_nothing(api: Api) -> None:
    job_id = store.insert_job(api.db, small_plan(2, (0,)))
    streams, url = api.app.state.streams, f"/api/jobs/{job_id}/results?follow=true"
    with api.http.stream("GET", url) as answer:
        assert answer.status_code == 200 and streams.open == 1
        until(lambda: api.app.state.context.tails.followed == 1)
    until(lambda: streams.open == api.app.state.context.tails.followed == 0)


def test_a_server_that_stops_breaks_what_is_followed(
    sqlite_db: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = store.insert_job(sqlite_db, small_plan(2, (0,)))
    with ExitStack() as stack, httpx.Client(timeout=60) as client:
        api = stack.enter_context(api_at(sqlite_db, settings_in(tmp_path)))
        url = f"{api.url}/api/jobs/{job_id}/results?follow=true"
        with client.stream("GET", url) as answer:
            until(lambda: api.app.state.context.tails.followed == 1)
            stack.close()
            with pytest.raises(httpx.RemoteProtocolError):
                answer.read()
    assert "http.failed" not in caplog.text


def routes(api: Api) -> Iterator[tuple[str, str]]:
    """Method and path of each route of the status API."""
    for path, item in api.app.openapi()["paths"].items():
        for method in item if path.startswith("/api/") else ():
            yield method.upper(), path


def test_other_owners_jobs_do_not_exist(keyed_api: Api) -> None:
    api = keyed_api
    job_id = store.insert_job(api.db, small_plan(1, (0,)), Origin(owner="ann"))
    (request_id,) = (each.id for each in views.requests(api.db, job_id))
    ann, bob = api.bearer("ann"), api.bearer("bob")
    admin = api.bearer("root", "admin")
    before = rows(api.db, "SELECT * FROM jobs")
    asked = 0
    for method, path in routes(api):
        if "{" not in path:
            continue
        url = path.format(job=job_id, request_id=request_id)
        assert api.http.request(method, url, headers=bob).status_code == 404, url
        assert api.http.request(method, url).status_code == 401, url
        asked += 1
    assert asked > 12 and rows(api.db, "SELECT * FROM jobs") == before
    assert api.http.get("/api/jobs", headers=bob).json()["data"] == []
    assert api.http.get("/api/jobs/small", headers=bob).status_code == 404
    for seeing in (ann, admin):
        (seen,) = api.http.get("/api/jobs", headers=seeing).json()["data"]
        assert seen["id"] == job_id
        assert api.http.get(f"/api/requests/{request_id}", headers=seeing).status_code == 200
    reads = api.bearer("eve", "read", owner="ann")
    assert api.http.get(f"/api/jobs/{job_id}", headers=reads).status_code == 200
    assert api.http.post(f"/api/jobs/{job_id}/cancel", headers=reads).status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/api/jobs/%00",
        "/api/jobs/none",
        "/api/jobs/a%2Fb",
        "/api/requests/99999999999999999999",
        "/api/requests/-1",
        "/api/requests/5/chunks?after=99999999999999999999",
        "/api/jobs?limit=0",
        "/api/jobs?state=lost",
        "/api/jobs?since=yesterday",
        "/api/jobs?since=1.5e9",
        "/api/jobs?after=x",
    ],
)
def test_what_cannot_be_is_the_callers_error(api: Api, path: str) -> None:
    answer = api.http.get(path)
    assert answer.status_code in (400, 404), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_every_route_is_documented(api: Api) -> None:
    told = DOCS.read_text()
    for method, path in routes(api):
        heading = rf"^### `{method} {re.escape(path)}`$"
        assert re.search(heading, told, re.MULTILINE), (method, path)


def test_every_field_and_parameter_is_described(api: Api) -> None:
    document = api.app.openapi()
    for method, path in routes(api):
        operation = document["paths"][path][method.lower()]
        assert operation["summary"] and operation["description"], path
        for parameter in operation.get("parameters", ()):
            told = parameter.get("description") or parameter["schema"].get("description")
            assert told, (path, parameter)
        for status, response in operation["responses"].items():
            assert response["description"] and (status == "304" or response["content"]), path
