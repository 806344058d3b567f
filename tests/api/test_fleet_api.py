"""What there is to work with, as the rows say."""

from orchestrator.db import store
from tests.api.conftest import Api
from tests.orchestrator.db.builders import claim_some, rows, small_plan


def test_nothing_yet(api: Api) -> None:
    for path in ("workers", "queues", "schedules"):
        assert api.http.get(f"/api/{path}").json() == {"data": []}
    at_hand = api.http.get("/api/models").json()["data"]
    assert {"name": "tiny", "at_hand": True, "workers": 0, "slots": 0} in at_hand


def test_queues_are_counted_by_model(api: Api) -> None:
    store.insert_job(api.db, small_plan(3, (0,)))
    store.insert_job(api.db, small_plan(2, (0,), model="other"))
    claim_some(api.db, 1)
    one, two = api.http.get("/api/queues").json()["data"]
    assert (one["model"], one["queued"], one["running"]) == ("other", 2, 0)
    assert (two["model"], two["queued"], two["running"]) == ("tiny", 2, 1)
    assert one["oldest_waiting_seconds"] >= 0


def test_a_worker_is_told(api_with_worker: Api) -> None:
    api = api_with_worker
    (worker,) = api.http.get("/api/workers").json()["data"]
    assert [(worker["id"],)] == rows(api.db, "SELECT id FROM workers")
    assert worker["alive"] and worker["model"] == "tiny" and worker["slots"] == 8
    (model,) = [m for m in api.http.get("/api/models").json()["data"] if m["workers"]]
    assert model == {"name": "tiny", "at_hand": True, "workers": 1, "slots": 8}
