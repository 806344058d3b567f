"""Webhooks: told once a job has ended, signed, until taken; to nobody who must not be reached."""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator import lifecycle, outbound, webhooks
from orchestrator.db import deliveries, store
from orchestrator.db.database import Database
from orchestrator.errors import SpecError
from orchestrator.queue import ORCHESTRATOR_QUEUE, Queue, model_queue
from orchestrator.reconciler import ReconcilerThread, reconcile
from orchestrator.settings import Settings
from tests.api.hooks import Receiver, is_signed, receiving
from tests.nudges import embedded_queue
from tests.orchestrator.db.builders import claim_some, small_plan, write

SECRET = "a-secret-of-some-length"


@pytest.fixture
def queue() -> Iterator[Queue]:
    made = embedded_queue(model_queue("tiny"), ORCHESTRATOR_QUEUE)
    yield made
    made.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def submit(db: Database, queue: Queue, url: str, secret: str = SECRET) -> str:
    return lifecycle.submit(db, small_plan(), queue, webhook={"url": url, "secret": secret})


def finish(db: Database) -> None:
    """Every claimable request succeeds."""
    done = [
        write(claimed, 0, (7,), "0", end="stop", whole="0", outcome="succeeded")
        for claimed in claim_some(db)
    ]
    assert not store.flush(db, done, lease_seconds=60).lost


def ended(db: Database, queue: Queue, url: str, secret: str = SECRET) -> str:
    """A job that has ended and whose delivery is due."""
    job_id = submit(db, queue, url, secret)
    finish(db)
    lifecycle.grade(db, job_id)
    assert deliveries.announce(db) == 1
    return job_id


def make_due(db: Database) -> None:
    """Let time pass until whatever is still to be sent is due."""
    clock = (
        "strftime('%Y-%m-%d %H:%M:%f', 'now', '-1 seconds')"
        if db.dialect == "sqlite"
        else "now() - interval '1 second'"
    )
    with db.write() as tx:
        tx.execute(text(f"UPDATE deliveries SET next_at = {clock} WHERE next_at IS NOT NULL"))


def status(db: Database, job_id: str) -> deliveries.DeliveryStatus:
    found = deliveries.delivery_status(db, job_id)
    assert found is not None
    return found


def seconds_left(db: Database, job_id: str) -> float:
    found = status(db, job_id)
    assert found.next_at is not None
    return found.next_at.timestamp() - time.time()


def test_a_delivery_is_made_once_the_job_has_ended_and_only_once(
    db: Database, queue: Queue
) -> None:
    job_id = submit(db, queue, "https://example.org/")
    silent = lifecycle.submit(db, small_plan(), queue)
    assert deliveries.announce(db) == 0, "it has not ended"
    finish(db)
    assert deliveries.announce(db) == 0, "it is not graded"
    lifecycle.grade(db, job_id)
    lifecycle.grade(db, silent)
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda _: deliveries.announce(db), range(8))) == 1
    assert status(db, job_id).attempts == 0
    assert deliveries.delivery_status(db, silent) is None
    assert deliveries.announce(db) == 0


def test_what_is_sent_is_the_status_signed_as_the_convention_says(
    db: Database, queue: Queue, receiver: Receiver
) -> None:
    job_id = ended(db, queue, receiver.url())
    before = int(time.time())
    assert webhooks.send_due(db, private=True) == 1
    (message,) = receiver.received
    said = json.loads(message.body)
    assert message.path == "/hook?token=t"
    assert message.headers["content-type"] == "application/json"
    assert is_signed(message, SECRET.encode())
    assert not is_signed(replace(message, body=message.body + b" "), SECRET.encode())
    assert before <= int(message.headers["webhook-timestamp"]) <= time.time()
    assert said["type"] == "job.ended"
    assert said["id"] == message.headers["webhook-id"] and "." not in said["id"]
    assert (said["data"]["id"], said["data"]["state"]) == (job_id, "succeeded")
    assert said["data"]["succeeded"] == 4
    assert said["created_at"] == said["data"]["finished_at"]
    assert SECRET.encode() not in message.body
    found = status(db, job_id)
    assert found.delivered_at and found.next_at is None and found.last_status == 200
    assert webhooks.send_due(db, private=True) == 0


def test_a_secret_of_the_conventions_form_is_base64_of_the_key(
    sqlite_db: Database, queue: Queue, receiver: Receiver
) -> None:
    key = bytes(range(24))
    ended(sqlite_db, queue, receiver.url(), "whsec_" + base64.b64encode(key).decode())
    webhooks.send_due(sqlite_db, private=True)
    assert is_signed(receiver.received[0], key)


def test_what_is_not_taken_is_sent_again_later_and_later_with_the_same_id(
    db: Database, queue: Queue
) -> None:
    with receiving([500, 302, 404]) as receiver:
        job_id = ended(db, queue, receiver.url())
        waits = []
        for answered in (500, 302, 404):
            assert webhooks.send_due(db, private=True) == 1
            assert webhooks.send_due(db, private=True) == 0, "it is not due yet"
            assert status(db, job_id).last_error == f"answered {answered}"
            waits.append(seconds_left(db, job_id))
            make_due(db)
        webhooks.send_due(db, private=True)
        assert [each.path for each in receiver.received] == ["/hook?token=t"] * 4, "no redirects"
    assert waits == sorted(waits) and waits[0] < 7 and waits[2] > 80
    assert len({each.headers["webhook-id"] for each in receiver.received}) == 1
    found = status(db, job_id)
    assert found.delivered_at and found.attempts == 4 and found.last_error is None


def test_it_is_given_up_after_the_last_attempt_and_at_once_when_it_is_gone(
    db: Database, queue: Queue
) -> None:
    attempts = len(webhooks.DELAYS_SECONDS) + 1
    with receiving([503] * attempts) as receiver:
        job_id = ended(db, queue, receiver.url())
        for _ in range(attempts + 2):
            webhooks.send_due(db, private=True)
            make_due(db)
        assert len(receiver.received) == attempts == 8
        found = status(db, job_id)
        assert found.failed_at and found.next_at is None and found.delivered_at is None
        receiver.statuses[:] = [410]
        gone = ended(db, queue, receiver.url())
        webhooks.send_due(db, private=True)
        assert status(db, gone).failed_at and status(db, gone).attempts == 1


def test_of_many_senders_one_sends(db: Database, queue: Queue, receiver: Receiver) -> None:
    jobs = {ended(db, queue, receiver.url()) for _ in range(10)}
    with ThreadPoolExecutor(4) as pool:
        sent = sum(pool.map(lambda _: webhooks.send_due(db, private=True), range(12)))
    assert sent == 10
    told = [json.loads(message.body)["data"]["id"] for message in receiver.received]
    assert sorted(told) == sorted(jobs)


def test_a_killed_senders_message_is_due_again_and_its_late_word_changes_nothing(
    db: Database, queue: Queue, receiver: Receiver
) -> None:
    job_id = ended(db, queue, receiver.url())
    (lost,) = deliveries.claim_due(db, limit=5, lease_seconds=60)
    assert webhooks.send_due(db, private=True) == 0, "it is leased"
    make_due(db)
    (held,) = deliveries.claim_due(db, limit=5, lease_seconds=60)
    assert held.attempt == 2
    deliveries.postpone(db, lost, 0, status=500, error="late")
    deliveries.give_up(db, lost, status=500, error="late")
    found = status(db, job_id)
    assert found.last_error is None and found.failed_at is None and seconds_left(db, job_id) > 30
    deliveries.delivered(db, lost, 200)
    deliveries.give_up(db, held, status=500, error="late")
    found = status(db, job_id)
    assert found.delivered_at and found.failed_at is None, "taken is taken, whoever sent it"


REFUSED = [
    "ftp://example.org/",
    "file:///etc/passwd",
    "//example.org/",
    "",
    "http:///path",
    "http://user:hidden@8.8.8.8/",
    "http://8.8.8.8:0/",
    "http://8.8.8.8:99999/",
    "http://8.8.8.8/a b",
    "http://8.8.8.8/\r\nx: y",
    "http://8.8.8.8\\@127.0.0.1/",
    "http://8.8.8.8/" + "a" * 2000,
    "http://127.0.0.1/",
    "http://127.1/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://localhost:8000/",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://100.100.100.200/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://[::]/",
    "http://[::1]/",
    "http://[fe80::1]/",
    "http://[fd00:ec2::254]/",
    "http://[ff02::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::127.0.0.1]/",
    "http://[2002:7f00:1::]/",
    "http://[64:ff9b::a00:1]/",
]


@pytest.mark.parametrize("url", REFUSED)
def test_where_no_webhook_may_go(url: str) -> None:
    with pytest.raises(SpecError) as refused:
        webhooks.check_target(url, Settings())
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("url", ["https://8.8.8.8/", "http://[2001:4860:4860::8888]:8080/x?y=1"])
def test_public_addresses_may_be_told(url: str) -> None:
    webhooks.check_target(url, Settings())


def test_private_addresses_only_by_the_setting() -> None:
    allowed = replace(Settings(), webhook_private=True)
    for url in ("http://127.0.0.1:1/", "http://10.0.0.1/", "http://[::1]/"):
        webhooks.check_target(url, allowed)
    for url in ("http://0.0.0.0/", "ftp://10.0.0.1/", "http://u:p@10.0.0.1/"):
        with pytest.raises(SpecError):
            webhooks.check_target(url, allowed)


def test_the_address_is_checked_again_when_it_is_sent(
    sqlite_db: Database, queue: Queue, receiver: Receiver
) -> None:
    job_id = ended(sqlite_db, queue, receiver.url(host="localhost"))
    webhooks.send_due(sqlite_db, private=False)
    assert not receiver.received
    assert "public addresses" in str(status(sqlite_db, job_id).last_error)


def resolve_once(monkeypatch: pytest.MonkeyPatch, name: str, address: str) -> list[str]:
    """`name` leads to `address` the first time, later nowhere; the names that were asked for."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def answer(host: Any, port: Any, *args: Any, **kw: Any) -> Any:
        if host != name:
            return real(host, port, *args, **kw)
        asked.append(host)
        if len(asked) > 1:
            raise socket.gaierror(socket.EAI_NONAME, "rebound")
        return real(address, port, *args, **kw)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


def test_the_connection_goes_to_the_very_address_that_was_checked(
    sqlite_db: Database, queue: Queue, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = ended(sqlite_db, queue, receiver.url(host="hooks.test"))
    asked = resolve_once(monkeypatch, "hooks.test", "127.0.0.1")
    webhooks.send_due(sqlite_db, private=True)
    assert status(sqlite_db, job_id).delivered_at and asked == ["hooks.test"]
    assert receiver.received[0].headers["host"] == f"hooks.test:{receiver.port}"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The files of a certificate for hooks.test and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    chain, key = str(folder / "chain.pem"), str(folder / "key.pem")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=hooks"
    name = ["-addext", "subjectAltName=DNS:hooks.test"]
    files = ["-keyout", key, "-out", chain]
    subprocess.run(["openssl", *words.split(), *name, *files], check=True, capture_output=True)
    return chain, key


@pytest.mark.parametrize(
    ("name", "trusted"), [("hooks.test", True), ("others.test", True), ("hooks.test", False)]
)
def test_https_is_verified_by_the_hosts_name(
    sqlite_db: Database,
    queue: Queue,
    certificate: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    trusted: bool,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0] if trusted else os.devnull)
    resolve_once(monkeypatch, name, "127.0.0.1")
    with receiving(certificate=certificate) as receiver:
        job_id = ended(sqlite_db, queue, receiver.url(host=name))
        webhooks.send_due(sqlite_db, private=True)
        found = status(sqlite_db, job_id)
        assert bool(receiver.received) == (name == "hooks.test" and trusted)
    if not receiver.received:
        assert found.last_error == "TLS: CERTIFICATE_VERIFY_FAILED"


def test_whoever_answers_a_byte_at_a_time_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "WHOLE_SECONDS", 0.3)
    let_go = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
                while not let_go.wait(0.02):
                    try:
                        connection.sendall(b"a")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            to = outbound.target(f"http://127.0.0.1:{server.getsockname()[1]}/", private=True)
            with pytest.raises(outbound.Unsent):
                outbound.post(to, b"{}", {})
        finally:
            let_go.set()
            thread.join()


def test_of_an_endless_answer_only_the_beginning_is_read(receiver: Receiver) -> None:
    sent = 0
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pour() -> None:
            nonlocal sent
            connection, _ = server.accept()
            with connection:
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    while sent < 1 << 30:
                        sent += connection.send(b"a" * 65536)
                except OSError:
                    return

        thread = threading.Thread(target=pour)
        thread.start()
        to = outbound.target(f"http://127.0.0.1:{server.getsockname()[1]}/", private=True)
        assert outbound.post(to, b"{}", {}) == 200
        thread.join()
    assert sent < 1 << 27


@pytest.mark.parametrize(
    "secret", ["", "short", "a" * 201, "with a blank in it", "whsec_!!!!!!!!!!!"]
)
def test_secrets_that_cannot_sign_are_refused_and_not_repeated(secret: str) -> None:
    with pytest.raises(SpecError) as refused:
        webhooks.check_secret(secret)
    assert not secret or secret not in str(refused.value)


def test_neither_secret_nor_url_are_logged(
    sqlite_db: Database, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with receiving([500]) as receiver:
        ended(sqlite_db, queue, receiver.url(path="/?word=in-the-url"))
        webhooks.send_due(sqlite_db, private=True)
        make_due(sqlite_db)
        (delivery,) = deliveries.claim_due(sqlite_db, limit=1, lease_seconds=60)
        logging.getLogger("test").info("%r", delivery)
        webhooks.send(sqlite_db, delivery, private=False)
        webhooks.send(sqlite_db, delivery, private=True)
    assert "webhook.failed" in caplog.text and "webhook.delivered" in caplog.text
    assert SECRET not in caplog.text and "in-the-url" not in caplog.text


def test_the_reconcilers_process_sends(db: Database, queue: Queue, receiver: Receiver) -> None:
    job_id = submit(db, queue, receiver.url())
    thread = ReconcilerThread(db, queue, interval_seconds=0.05, webhook_private=True)
    thread.start()
    try:
        finish(db)
        assert receiver.came.acquire(timeout=30)
    finally:
        thread.stop()
    assert json.loads(receiver.received[0].body)["data"]["id"] == job_id


def test_a_job_cancelled_at_the_door_is_told_of_too(
    sqlite_db: Database, queue: Queue, receiver: Receiver
) -> None:
    job_id = submit(sqlite_db, queue, receiver.url())
    lifecycle.cancel(sqlite_db, job_id, "not wanted")
    reconcile(sqlite_db, queue)
    webhooks.send_due(sqlite_db, private=True)
    data = json.loads(receiver.received[0].body)["data"]
    assert (data["state"], data["cancel_reason"]) == ("cancelled", "not wanted")


def test_a_deleted_jobs_webhook_goes_with_it(sqlite_db: Database, queue: Queue) -> None:
    job_id = ended(sqlite_db, queue, "https://example.org/")
    with sqlite_db.write() as tx:
        tx.execute(text("DELETE FROM jobs WHERE id = :id"), {"id": job_id})
    assert deliveries.delivery_status(sqlite_db, job_id) is None
    assert webhooks.send_due(sqlite_db, private=False) == 0


def test_the_page_says_how_to_verify() -> None:
    page = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(compile(code, "webhooks.md", "exec"), scope)  # noqa: S102  our own page
    body, at = b'{"type":"job.ended"}', int(time.time())
    for secret in (SECRET, "whsec_" + base64.b64encode(bytes(24)).decode()):
        headers = {
            "webhook-id": "msg_1",
            "webhook-timestamp": str(at),
            "webhook-signature": webhooks.signature(secret, "msg_1", at, body),
        }
        assert scope["is_genuine"](secret, headers, body)
        assert not scope["is_genuine"](secret, headers, body + b" ")
        assert not scope["is_genuine"](secret, {**headers, "webhook-id": "msg_2"}, body)
        old = str(at - 3600)
        resigned = webhooks.signature(secret, "msg_1", int(old), body)
        assert not scope["is_genuine"](
            secret, {**headers, "webhook-timestamp": old, "webhook-signature": resigned}, body
        )
