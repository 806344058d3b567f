"""What happens to a job from outside: submit, cancel, pause, resume, retry, grade.

The only place that writes and then wakes. Order matters: the rows are committed first, then the
nudge is sent; a nudge that is lost costs time, never work. Knows nothing of devices or of how a
job is shown.
"""

import os
import socket
from collections.abc import Iterator, Mapping
from itertools import islice

from orchestrator.db import kept, leftovers, store, views
from orchestrator.db.database import Database
from orchestrator.errors import Conflict
from orchestrator.evaluation.graders import grade as grade_text
from orchestrator.queue import Queue
from orchestrator.spec.plan import Plan

_SCORES_A_WRITE = 500
_OPEN_STATES = {"queued", "running", "paused"}


def submit(
    db: Database,
    plan: Plan,
    queue: Queue,
    *,
    owner: str = "",
    kind: str = "job",
    handle: str | None = None,
    idempotency_key: str | None = None,
    webhook: Mapping[str, object] | None = None,
) -> str:
    """Write the whole plan, then wake a worker; the job's id.

    `kind`: `job`, or `batch` or `chat` for a plan of bodies. A chat's `handle` is its completion's
    id unless another is given. `webhook`: {url, secret}. The same owner's `idempotency_key` with
    the same content again gives the first job's id and writes nothing; raises Conflict where the
    content is another.
    """
    job_id = _first(db, plan, owner, idempotency_key)
    if job_id is None:
        origin = store.Origin(owner, kind, handle, idempotency_key, webhook)
        try:
            job_id = store.insert_job(db, plan, origin)
        except Conflict:  # somebody with the same key was faster
            job_id = _first(db, plan, owner, idempotency_key)
            if job_id is None:
                raise
    queue.wake(plan.spec.model)  # once more where it was submitted before: a nudge may be lost
    return job_id


def _first(db: Database, plan: Plan, owner: str, key: str | None) -> str | None:
    """The job that was submitted with this key before."""
    found = None if key is None else store.submitted(db, owner, key)
    if found is None:
        return None
    job_id, digest = found
    if digest != plan.spec.digest:
        raise Conflict("idempotency key", str(key), "it was used for a job of other content")
    return job_id


def unfinished(db: Database, name: str, digest: str) -> str | None:
    """The newest job of this name and content that has something to do or to grade, or None."""
    for job_id in views.same_jobs(db, name, digest):
        if views.job_status(db, job_id).state in _OPEN_STATES or _is_ungraded(db, job_id):
            return job_id
    return None


def cancel(db: Database, job_id: str, reason: str | None = None) -> None:
    """End what has not ended: queued requests now, running ones at their next flush, text kept.

    Nobody needs waking: whoever flushes reads it. Raises NotFound, Conflict when all has ended.
    """
    store.cancel_job(db, job_id, reason)


def pause(db: Database, job_id: str) -> None:
    """Claim no more of it; running requests come back at their next flush, tokens kept.

    Raises NotFound, Conflict when all has ended.
    """
    store.pause_job(db, job_id)


def retry(db: Database, job_id: str, queue: Queue) -> int:
    """Queue the failed requests again, their tokens kept, and wake a worker; how many.

    Raises NotFound, Conflict for a cancelled job.
    """
    retried = store.retry_failed(db, job_id)
    if retried:
        queue.wake(views.job_status(db, job_id).model)
    return retried


def resume(db: Database, job_id: str, queue: Queue) -> None:
    """Lift the pause, take back what dead workers of this host held, wake a worker."""
    store.resume_job(db, job_id)
    release_dead(db)
    queue.wake(views.job_status(db, job_id).model)


def release_dead(db: Database) -> int:
    """Queue again what is held by an expired lease or by a process of this host that is gone."""
    released = store.release_expired(db)
    for worker in views.workers(db):
        if worker.hostname == socket.gethostname() and not _is_running(worker.pid):
            released += store.release_worker(db, worker.id)
            store.stop_worker(db, worker.id)
    return released


def grade(db: Database, job_id: str) -> int:
    """Score every finished choice that has no score yet; how many scores were written.

    Marks a job that had ended as graded, so that no reconciler asks for it again.
    """
    ended = leftovers.has_ended(db, job_id)  # asked first: what ends from here on is not scored
    written, scores = 0, _scores(db, job_id)
    while batch := list(islice(scores, _SCORES_A_WRITE)):
        store.insert_scores(db, batch)
        written += len(batch)
    if ended:
        leftovers.mark_graded(db, job_id)
        kept.keep_points(db, job_id)
    return written


def _is_ungraded(db: Database, job_id: str) -> bool:
    return next(_scores(db, job_id), None) is not None


def _scores(db: Database, job_id: str) -> Iterator[store.ScoreWrite]:
    graders = {grader.name: grader for grader in views.graders(db, job_id)}
    for found in views.ungraded(db, job_id, list(graders)):
        for name in found.graders:
            score = grade_text(graders[name], found.text, found.columns)
            yield store.ScoreWrite(found.request_id, found.choice, name, score.score, score.detail)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as somebody else
        return True
    return True
