"""Batches from file to files: validated and submitted, cancelled, ended with what came of them.

Every step can be taken again by whoever comes next, so that a kill between two of them costs time
and nothing else: the batch's id is its job's idempotency key, and files are on disk before the
transaction that names them. Runs where the files' folder is, beside the API. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from orchestrator import allowance, batch_lines, files, lifecycle
from orchestrator.batch_lines import LineError, Rules
from orchestrator.db import batches, store, views
from orchestrator.db import files as file_rows
from orchestrator.db.batches import Batch
from orchestrator.db.database import Database
from orchestrator.db.files import OUTPUT, NewFile
from orchestrator.db.releases import DEADLINE
from orchestrator.db.tables import BATCH
from orchestrator.errors import Conflict, NotFound, ParameterError, PenstockError, SpecError
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.spec.bodies import plan_bodies
from orchestrator.spec.plan import Plan

INTERVAL_SECONDS = 2.0
STRAY_SECONDS = 3600.0
_LOOKS_A_SWEEP = 300
_STOP_SECONDS = 10.0
REASON = "the batch was cancelled"

log = logging.getLogger("penstock.batches")


@dataclass(frozen=True, slots=True)
class Batches:
    """What looking after batches takes; `models` and `check` as the API's context has them."""

    settings: Settings
    db: Database
    queue: Queue
    models: Collection[str] = ()
    check: Callable[[Plan], None] = lambda plan: None

    @property
    def folder(self) -> Path:
        """Where the bytes of files are."""
        return self.settings.files_dir

    @property
    def rules(self) -> Rules:
        """What a line may be."""
        settings = self.settings
        return Rules(
            openai_compatible=settings.openai_compatible,
            max_lines=settings.max_batch_lines,
            max_choices=settings.max_choices,
            max_line_bytes=settings.max_body_mib * 2**20,
        )

    def serves(self, model: str) -> bool:
        """Whether there is such a model: at hand here, or served by a worker now or before."""
        return model in self.models or any(w.model == model for w in views.workers(self.db))


def look(my: Batches) -> int:
    """Take every batch one step further that has one to take; how many. Idempotent."""
    # Here too, so that a batch ends in time though no worker lives that would reconcile.
    store.expire_deadlines(my.db)
    store.release_expired(my.db)
    taken = 0
    for batch_id in batches.due_batches(my.db):
        try:
            taken += advance(my, batch_id)
        except PenstockError as error:  # one that cannot go on holds up no other
            log.warning("batch.waits id=%s error=%s", batch_id, error)
        except Exception:
            log.exception("batch.waits id=%s", batch_id)
    return taken


def advance(my: Batches, batch_id: str) -> bool:
    """The next step of one batch, unless somebody else is at it."""
    seconds = my.settings.lease_seconds
    batch = batches.lease_batch(my.db, batch_id, seconds)
    if batch is None:
        return False
    try:
        with _kept(my.db, batch_id, seconds):
            _step(my, batch)
    finally:
        batches.unlease_batch(my.db, batch_id)
    return True


def sweep_files(my: Batches, stray_seconds: float = STRAY_SECONDS) -> None:
    """Remove the bytes of what is deleted, past its time, or was left behind by a kill."""
    expire_files(my)
    parts, whole = files.strays(my.folder, stray_seconds)
    for part in parts:
        part.unlink(missing_ok=True)
    for file_id in set(whole) - file_rows.known_files(my.db, whole):
        files.remove(my.folder, file_id)
        log.info("file.swept id=%s", file_id)


def expire_files(my: Batches) -> None:
    """Files past their time are gone, and so are the bytes of all that are."""
    file_rows.expire_files(my.db)
    gone = file_rows.deleted_files(my.db)
    for file_id in gone:
        files.remove(my.folder, file_id)
    file_rows.forget_files(my.db, gone)


def _step(my: Batches, batch: Batch) -> None:
    if batch.job_id is None:
        _begin(my, batch)
        batch = batches.batch(my.db, batch.id)
    if batch.job_id is None or batch.ended:
        return
    if batch.cancelling_at is not None:
        with suppress(Conflict, NotFound):  # it has ended meanwhile
            lifecycle.cancel(my.db, batch.job_id, REASON)
    if views.job_status(my.db, batch.job_id).finished_at is not None:
        _end(my, batch.id, batch.job_id)


def _begin(my: Batches, batch: Batch) -> None:
    """Validate, and submit what is valid, unless a killed one has done so before."""
    if batch.in_progress_at is not None:
        _fail(my, batch, [LineError("job_removed", "The batch's job was removed.")])
    elif (known := batches.job_of_batch(my.db, batch)) is not None:
        job_id, model, lines = known
        batches.begin_batch(my.db, batch.id, job_id=job_id, model=model, lines=lines)
        log.info("batch.found id=%s job=%s", batch.id, job_id)
    elif batch.cancelling_at is not None:
        batches.end_batch(my.db, batch.id, batches.CANCELLED)
        log.info("batch.cancelled id=%s", batch.id)
    else:
        _validate(my, batch)


def _validate(my: Batches, batch: Batch) -> None:
    path = files.place(my.folder, batch.input_file_id)
    try:
        found = batch_lines.check(path, my.rules, my.serves)
        if found.errors or found.model is None:
            return _fail(my, batch, found.errors)
        plan = plan_bodies(
            batch.id,
            found.model,
            lambda: batch_lines.bodies(path, my.rules),
            seed=_seed(batch),
            source=batch.input_file_id,
            deadline_at=batch.expires_at.isoformat(),
        )
        allowance.check(plan, my.settings)
        my.check(plan)
        job_id = lifecycle.submit(
            my.db, plan, my.queue, owner=batch.owner, kind=BATCH, idempotency_key=batch.id
        )
    except FileNotFoundError:
        text = "The bytes of the input file are gone."
        return _fail(my, batch, [LineError("input_file_missing", text)])
    except ParameterError as error:
        return _fail(my, batch, [batch_lines.refused(path, my.rules, error)])
    except (SpecError, Conflict) as error:
        return _fail(my, batch, [LineError("invalid_request", str(error))])
    model, lines = found.model, found.lines
    batches.begin_batch(my.db, batch.id, job_id=job_id, model=model, lines=lines)
    log.info("batch.begun id=%s job=%s lines=%s", batch.id, job_id, lines)


def _seed(batch: Batch) -> int:
    """63 bits, from which requests without a seed of their own derive theirs."""
    digest = hashlib.blake2b(batch.id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _fail(my: Batches, batch: Batch, errors: list[LineError]) -> None:
    batches.fail_batch(my.db, batch.id, [error.to_json() for error in errors])
    log.info("batch.failed id=%s errors=%s", batch.id, len(errors))


def _end(my: Batches, batch_id: str, job_id: str) -> None:
    """Write both files, then name them; what is written in vain is nobody's and removed."""
    batches.finalize_batch(my.db, batch_id)
    batch = batches.batch(my.db, batch_id)  # from here on nobody cancels it any more
    if (written := _write(my, batch, job_id)) is None:
        return  # a request has begun again: somebody retries what had failed
    output, errors = written
    how = _how(batch, views.job(my.db, job_id))
    if batches.end_batch(my.db, batch_id, how, output=output, errors=errors):
        log.info("batch.%s id=%s", how, batch_id)
        return
    for new in (output, errors):
        if new:
            files.remove(my.folder, new.id)


def _write(my: Batches, batch: Batch, job_id: str) -> tuple[NewFile | None, NewFile | None] | None:
    """The output and the error file, each None without a line; None: not all have ended."""
    succeeded, others = 0, 0
    with files.incoming(my.folder) as output, files.incoming(my.folder) as errors:
        for result in views.results(my.db, job_id):
            good, told = batch_lines.line(result)
            (output if good else errors).write(told)
            succeeded, others = succeeded + good, others + (not good)
        if succeeded + others != batch.lines:
            return None
        return (
            _file(my, batch, output, "output") if succeeded else None,
            _file(my, batch, errors, "error") if others else None,
        )


def _file(my: Batches, batch: Batch, out: BinaryIO, what: str) -> NewFile:
    file_id = files.new_id("file-")
    size = files.keep(out, my.folder, file_id)
    name = f"{batch.id}_{what}.jsonl"
    return NewFile(file_id, batch.owner, name, OUTPUT, size, batch.output_expires_seconds)


def _how(batch: Batch, job: views.Job) -> str:
    """How it ended: who cancels it is heard, though its window closes meanwhile."""
    if batch.cancelling_at is None and job.cancelled_at is None:
        return batches.COMPLETED
    late = batch.cancelling_at is None and job.cancel_reason == DEADLINE
    return batches.EXPIRED if late else batches.CANCELLED


@contextmanager
def _kept(db: Database, batch_id: str, seconds: float) -> Iterator[None]:
    """The lease renewed for the time of the block, from a thread: the work knows nothing of it."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(seconds / 3):
            with suppress(PenstockError):
                batches.renew_batch(db, batch_id, seconds)

    thread = threading.Thread(target=renew, name="penstock-batch-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class BatchThread(threading.Thread):
    """Looks every few seconds, or sooner when nudged; outlives a database that is away."""

    def __init__(self, my: Batches, *, interval_seconds: float = INTERVAL_SECONDS) -> None:
        super().__init__(name="penstock-batches", daemon=True)
        self._my, self._interval = my, min(interval_seconds, my.settings.lease_seconds / 2)
        self._nudged, self._stopping = threading.Event(), threading.Event()

    def nudge(self) -> None:
        """Look now."""
        self._nudged.set()

    def stop(self) -> None:
        """End after the step that is under way."""
        self._stopping.set()
        self._nudged.set()
        if self.is_alive():
            self.join(_STOP_SECONDS)

    def run(self) -> None:
        """Look, wait, look again, until stopped; never raises."""
        looks = 0
        while not self._stopping.is_set():
            self._nudged.clear()
            self._look(sweeping=looks % _LOOKS_A_SWEEP == 0)
            looks += 1
            self._nudged.wait(self._interval)

    def _look(self, sweeping: bool) -> None:
        try:
            look(self._my)
            sweep_files(self._my) if sweeping else expire_files(self._my)
        except PenstockError as error:  # the database or the disk is away: perhaps not for long
            log.warning("batches.failed error=%s", error)
        except Exception:
            log.exception("batches.failed")
