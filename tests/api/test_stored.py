"""Completions read again: by id, page by page, their messages; removed; other people's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from orchestrator.db import stored
from orchestrator.db.database import Database
from orchestrator.db.store import Origin, flush, insert_job
from orchestrator.db.tables import CHAT
from orchestrator.db.writes import ChoiceEnd, ChunkWrite, RequestWrite
from orchestrator.errors import Conflict, NotFound
from orchestrator.spec.bodies import plan_bodies
from tests.api.chatting import Service, chat, newest, serving, tiny
from tests.orchestrator.db.builders import claim_some, rows, run

Json = dict[str, Any]
SUM = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]
PARTS: list[Json] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": SUM},
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    file = tmp_path_factory.mktemp("stored") / "penstock.db"
    with serving(f"sqlite:///{file}", model=tiny(2)) as running:
        yield running


@pytest.fixture(scope="module")
def answers(service: Service) -> list[Json]:
    """Five completions as they were answered, the first with parts."""
    bodies = [chat(messages=PARTS), *(chat(max_tokens=count) for count in (1, 2, 3, 4))]
    return [httpx.post(f"{service.v1}/chat/completions", json=body).json() for body in bodies]


def get(service: Service, path: str = "", **query: Any) -> httpx.Response:
    return httpx.get(f"{service.v1}/chat/completions{path}", params=query)


def test_each_is_read_as_it_was_answered(service: Service, answers: list[Json]) -> None:
    for each in answers:
        assert get(service, f"/{each['id']}").json() == each


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_pages_give_each_once(
    service: Service, answers: list[Json], order: str, limit: int
) -> None:
    found: list[Json] = []
    query: Json = {"limit": limit, "order": order}
    while True:
        page = get(service, **query).json()
        assert page["object"] == "list"
        assert page["first_id"] == page["data"][0]["id"]
        assert page["last_id"] == page["data"][-1]["id"]
        found += page["data"]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert found == (answers if order == "asc" else answers[::-1])


def test_the_words_of_who_asked_stay_with_the_completion(service: Service) -> None:
    words = {"project": "\u00fcbung", "": "x" * 512, "k" * 64: ""}
    made = httpx.post(f"{service.v1}/chat/completions", json=chat(metadata=words)).json()
    told = [
        made,
        get(service, f"/{made['id']}").json(),
        get(service, order="desc").json()["data"][0],
    ]
    deleted = httpx.delete(f"{service.v1}/chat/completions/{made['id']}")
    assert [each["metadata"] for each in told] == [words] * 3
    assert deleted.status_code == 200


def test_pages_of_one_model(service: Service, answers: list[Json]) -> None:
    assert get(service, model="tiny").json()["data"] == answers
    empty = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert get(service, model="other").json() == empty


def test_they_are_found_by_their_metadata(db: Database) -> None:
    odd = "a, {b}'c.$ 0"
    for words in ({"of": "me", odd: "1"}, {"of": "you"}, {"of": "me"}, None):
        made = plan_bodies("chat", "tiny", [("chat", chat())], metadata=words)
        insert_job(db, made, Origin(kind=CHAT))
    run(db, "UPDATE requests SET state = 'succeeded'")

    def found(**metadata: str) -> int:
        return len(stored.chats_page(db, metadata=metadata))

    assert (found(), found(of="me"), found(of="you"), found(of="m")) == (4, 2, 1, 0)
    assert found(**{odd: "1"}) == found(**{odd: "1", "of": "me"}) == 1
    assert found(**{odd: "2"}) == found(**{odd: "1", "of": "you"}) == found(none="me") == 0


def test_a_filter_that_is_no_pair_is_refused(service: Service) -> None:
    for name in ("metadata", "metadata[]", 'metadata["a]', "metadata[a", "metadata[a][b]"):
        answer = get(service, **{name: "x"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata")


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 101}, {"order": "up"}])
def test_a_wrong_page_is_refused(service: Service, query: Json) -> None:
    answer = get(service, **query)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(query))


def test_its_messages(service: Service, answers: list[Json]) -> None:
    id = answers[0]["id"]
    page = get(service, f"/{id}/messages").json()
    assert [each["content"] for each in page["data"]] == ["Be short.", "What is 1 + 1?"]
    assert [each["content_parts"] for each in page["data"]] == [None, SUM]
    assert [each["role"] for each in page["data"]] == ["system", "user"]
    assert not page["has_more"]
    first = get(service, f"/{id}/messages", limit=1).json()
    assert first["data"] == page["data"][:1] and first["has_more"]
    second = get(service, f"/{id}/messages", after=first["last_id"]).json()
    assert second["data"] == page["data"][1:]
    backwards = get(service, f"/{id}/messages", order="desc").json()
    assert backwards["data"] == page["data"][::-1]


@pytest.mark.parametrize("path", ["/chatcmpl-none", "/chatcmpl-none/messages"])
def test_what_does_not_exist(service: Service, path: str) -> None:
    answer = get(service, path)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)


def test_what_is_removed_leaves_nothing(service: Service) -> None:
    id = httpx.post(f"{service.v1}/chat/completions", json=chat()).json()["id"]
    job = newest(service.db)["job"]
    answer = httpx.delete(f"{service.v1}/chat/completions/{id}")
    assert answer.json() == {"id": id, "object": "chat.completion.deleted", "deleted": True}
    assert get(service, f"/{id}").status_code == 404
    assert httpx.delete(f"{service.v1}/chat/completions/{id}").status_code == 404
    for table in ("items", "points", "requests"):
        assert rows(service.db, f"SELECT count(*) FROM {table} WHERE job_id = '{job}'") == [(0,)]
    orphans = "SELECT count(*) FROM {} WHERE request_id NOT IN (SELECT id FROM requests)"
    for table in ("choices", "chunks", "usage"):
        assert rows(service.db, orphans.format(table)) == [(0,)]


def submitted(db: Database, owner: str) -> str:
    """A queued chat of that owner; its completion's id."""
    plan = plan_bodies("chat", "tiny", [("chat", chat())])
    job_id = insert_job(db, plan, Origin(owner, "chat"))
    return str(rows(db, f"SELECT handle FROM jobs WHERE id = '{job_id}'")[0][0])


def finished(db: Database) -> None:
    """Whatever is queued, as a worker leaves it."""
    writes = [
        RequestWrite(
            request_id=each.request_id,
            epoch=each.epoch,
            attempt=each.attempt,
            chunks=(ChunkWrite(0, 0, (1,), "x"),),
            ends=(ChoiceEnd(0, "stop", "x"),),
            outcome="succeeded",
        )
        for each in claim_some(db)
    ]
    assert not flush(db, writes, lease_seconds=60).lost


def test_only_what_is_whole_exists_and_only_for_its_owner(db: Database) -> None:
    handle = submitted(db, "ann")
    with pytest.raises(NotFound):
        stored.find_chat(db, handle)
    assert stored.chats_page(db) == []
    with pytest.raises(Conflict):
        stored.delete_chat(db, handle)
    finished(db)
    job_id = stored.find_chat(db, handle)
    assert stored.find_chat(db, handle, owner="ann") == job_id
    assert stored.chats_page(db, owner="ann") == stored.chats_page(db) == [job_id]
    assert stored.chats_page(db, owner="bob") == []
    for asked in (stored.find_chat, stored.delete_chat):
        with pytest.raises(NotFound):
            asked(db, handle, owner="bob")
    with pytest.raises(NotFound):
        stored.chats_page(db, owner="bob", after=handle)
    stored.delete_chat(db, handle, owner="ann")
    assert stored.chats_page(db) == []
