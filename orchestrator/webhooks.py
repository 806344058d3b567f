"""Webhooks: whoever submitted a job is told that it has ended, signed, until they have taken it.

Signed as the Standard Webhooks convention says; each is sent at least once, so a receiver goes by
`webhook-id`. Knows nothing of HTTP routes: the door asks `check_target`, the reconciler's process
runs a `Sender`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import secrets
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime

from orchestrator import outbound
from orchestrator.db import deliveries, views
from orchestrator.db.columns import to_json
from orchestrator.db.database import Database
from orchestrator.db.deliveries import Delivery
from orchestrator.errors import PenstockError, SpecError
from orchestrator.settings import Settings

DELAYS_SECONDS = (5, 30, 120, 600, 1800, 7200, 18000)
"""After the first, second, ... attempt that failed; one more that fails, and it is given up."""

SHORTEST_SECRET, LONGEST_SECRET = 16, 200
_PREFIX = "whsec_"
_TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens", "replayed_tokens")
_LEASE_SECONDS = 120.0
_AT_ONCE = 4
_LOOK_SECONDS = 2.0
_STOP_SECONDS = 5.0
_GONE = 410
_JITTER = 0.2
_THREAD = "penstock-webhook"

log = logging.getLogger("penstock.webhooks")


def check_target(url: str, settings: Settings) -> None:
    """Refuse a URL that no webhook may go to. Resolves its host: not for the event loop.

    Raises SpecError, which does not repeat the URL. The same is looked at again when it is sent.
    """
    outbound.target(url, private=settings.webhook_private)


def check_secret(secret: str) -> None:
    """Refuse a secret that cannot sign. Raises SpecError, which does not repeat it."""
    length = f"{SHORTEST_SECRET} to {LONGEST_SECRET} printable ASCII characters"
    printable = all("!" <= letter <= "~" for letter in secret)
    if not (SHORTEST_SECRET <= len(secret) <= LONGEST_SECRET and printable):
        raise SpecError("webhook secret", length, f"{len(secret)} characters")
    try:
        _key(secret)
    except ValueError:
        raise SpecError("webhook secret", "base64 after whsec_", "something else") from None


def signature(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """`v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`.

    A secret that begins with `whsec_` is base64 of the key, any other is the key in UTF-8.
    """
    signed = b".".join((id.encode(), str(timestamp).encode(), body))
    return "v1," + base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256)).decode()


def body_of(db: Database, job_id: str) -> bytes:
    """What is sent: {type, id, created_at, data}, `data` the job as the API lists it.

    Raises NotFound.
    """
    status = views.job_status(db, job_id)
    data = {name: _plain(value) for name, value in asdict(status).items() if name != "owner"}
    data["usage"] = {name: data.pop(name) for name in _TOKENS}
    ended = status.finished_at or status.created_at
    return to_json(
        {
            "type": "job.ended",
            "id": _message_id(job_id),
            "created_at": _plain(ended),
            "data": data,
        }
    ).encode()


def send_due(db: Database, *, private: bool) -> int:
    """Send what is due, a few at a time; how many were claimed. Raises WorkerError."""
    due = deliveries.claim_due(db, limit=_AT_ONCE, lease_seconds=_LEASE_SECONDS)
    # Not a pool: its threads would keep a process from ending until the slowest has answered.
    threads = [
        threading.Thread(target=_try, args=(db, each, private), name=_THREAD, daemon=True)
        for each in due
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(due)


def _try(db: Database, delivery: Delivery, private: bool) -> None:
    try:
        send(db, delivery, private=private)
    except PenstockError as error:  # it is due again when the lease is over
        log.warning("webhook.unsettled job=%s error=%s", delivery.job_id, error)
    except Exception:
        log.exception("webhook.unsettled job=%s", delivery.job_id)


def send(db: Database, delivery: Delivery, *, private: bool) -> None:
    """Send it once and write down what came of it. Raises WorkerError."""
    status: int | None = None
    try:
        status = _post(db, delivery, private=private)
        error = "" if 200 <= status < 300 else f"answered {status}"
    except (SpecError, outbound.Unsent) as refused:
        error = str(refused)
    if not error and status is not None:
        deliveries.delivered(db, delivery, status)
        log.info("webhook.delivered job=%s attempt=%d", delivery.job_id, delivery.attempt)
        return
    log.warning(
        "webhook.failed job=%s attempt=%d error=%s", delivery.job_id, delivery.attempt, error
    )
    if status == _GONE or delivery.attempt > len(DELAYS_SECONDS):
        deliveries.give_up(db, delivery, status=status, error=error)
    else:
        delay = _jittered(DELAYS_SECONDS[delivery.attempt - 1])
        deliveries.postpone(db, delivery, delay, status=status, error=error)


def _post(db: Database, delivery: Delivery, *, private: bool) -> int:
    url, secret = (str(delivery.webhook.get(name) or "") for name in ("url", "secret"))
    check_secret(secret)
    to = outbound.target(url, private=private)
    id, timestamp = _message_id(delivery.job_id), int(time.time())
    body = body_of(db, delivery.job_id)
    headers = {
        "content-type": "application/json",
        "user-agent": "penstock-webhooks",
        "connection": "close",
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(secret, id, timestamp, body),
    }
    return outbound.post(to, body, headers)


class Sender(threading.Thread):
    """Sends what is due every few seconds; outlives a database that is away."""

    def __init__(self, db: Database, *, private: bool, look_seconds: float = _LOOK_SECONDS) -> None:
        super().__init__(name="penstock-webhooks", daemon=True)
        self._db, self._private, self._look_seconds = db, private, look_seconds
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End after what is being sent; what is cut off is due again when its lease is over."""
        self._stopping.set()
        if self.is_alive():
            self.join(_STOP_SECONDS)

    def run(self) -> None:
        """Send, wait, send again, until stopped; never raises."""
        while not self._stopping.is_set():
            if not self._look():
                self._stopping.wait(self._look_seconds)

    def _look(self) -> int:
        try:
            return send_due(self._db, private=self._private)
        except PenstockError as error:
            log.warning("webhooks.failed error=%s", error)
        except Exception:
            log.exception("webhooks.failed")
        return 0


def _key(secret: str) -> bytes:
    if secret.startswith(_PREFIX):
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    return secret.encode()


def _message_id(job_id: str) -> str:
    """The same at every attempt: receivers go by it to take a message once."""
    return f"msg_{job_id}"


def _jittered(seconds: float) -> float:
    part = secrets.SystemRandom().uniform(1 - _JITTER, 1 + _JITTER)
    return seconds * part


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return value
