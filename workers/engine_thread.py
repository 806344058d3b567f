"""One model's engine at work: claims while it has room, steps, flushes, shows that it lives.

Knows claims and rows by `orchestrator.db.store`; nothing of Celery, signals or other models.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from orchestrator.db import store
from orchestrator.db.database import Database
from orchestrator.errors import PenstockError, RequestError, WorkerError
from orchestrator.settings import Settings
from workers.admission import to_completion
from workers.counters import Counters
from workers.drawing.device_sampler import sampler_of
from workers.engine.blame import Blame
from workers.engine.engine import Completion, Engine, longest_first
from workers.engine_state import EngineState, Observer
from workers.loading.model import LoadedModel
from workers.recorder import Recorder
from workers.running.memory import resident_bytes

log = logging.getLogger("penstock.worker")
_SEEN_INTERVAL_SECONDS = 5.0
_STOP_SECONDS = 30.0
_SUSPECTS_INTERVAL_SECONDS = 1.0


class EngineThread(threading.Thread):
    """Works until it is stopped; `error` holds what ended it otherwise."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        model: LoadedModel,
        *,
        job_id: str | None = None,
        lasting: bool = False,
        finished: Callable[[str], None] = lambda job_id: None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """With `job_id` it claims from that job alone.

        `lasting`: a database that is away is waited for, however long; otherwise it ends the
        thread when the leases are over. `finished` is told the jobs of which a request has ended;
        `ended` is called when the thread ends by itself. Both return at once.
        """
        super().__init__(name=f"penstock-engine-{model.folder.name}", daemon=True)
        self._settings, self._db, self._model = settings, db, model
        self._job_id, self._lasting = job_id, lasting
        self._finished, self._ended = finished, ended
        self.worker_id = f"wrk_{uuid.uuid4().hex[:12]}"
        self.error: BaseException | None = None
        self._engine = Engine(
            model.runner,
            model.tokenizer,
            model.eos,
            sampler_of(model.runner, model.tokenizer.vocab_size),
            max_stall=settings.max_stall_ms / 1000,
            prefix_bytes=model.sizing.prefix_cache_bytes,
            least_chunk=model.calibration.chunk,
        )
        self._counters = Counters(model.folder.name)
        self._blame = Blame(self._engine, self._counters.failed)
        self._recorder = Recorder(
            db,
            model=model.folder.name,
            fingerprint=model.fingerprint,
            lease_seconds=settings.lease_seconds,
            flush_seconds=settings.flush_seconds,
            chat_seconds=settings.chat_flush_seconds,
        )
        self._nudged, self._stopping = threading.Event(), threading.Event()
        self._registered = False
        self._cut_off: list[tuple[int, int]] | None = None  # what was held as the database went
        self._claim_at = self._chats_at = self._seen_at = self._suspects_at = 0.0
        self._stepping_since: float | None = None
        names = self.worker_id, model.folder.name, model.runner.device
        self._observer = Observer(self._engine, self._counters, *names)
        self.state = self._state()

    @property
    def step_seconds(self) -> float:
        """How long the step that is under way has taken; 0 between two steps."""
        since = self._stepping_since
        return 0.0 if since is None else time.monotonic() - since

    def nudge(self) -> None:
        """There may be work: look at once."""
        self._nudged.set()

    def ask_to_stop(self) -> None:
        """Flush, release what is claimed, end; returns at once."""
        self._stopping.set()
        self._nudged.set()

    def stop(self, seconds: float = _STOP_SECONDS) -> None:
        """Ask to stop, and wait for it so long at most."""
        self.ask_to_stop()
        if self.is_alive():
            self.join(seconds)

    def run(self) -> None:
        """The engine's whole life; never raises."""
        try:
            while not self._stopping.is_set():
                self._turn_or_wait()
            self._recorder.release()
        except BaseException as error:  # whatever it was, the process that waits for us must know
            bug = not isinstance(error, PenstockError)
            log.error("worker.failed id=%s error=%s", self.worker_id, error, exc_info=bug)
            self.error = error
            self._give_up(error)
            self._ended()
        finally:
            self._engine.close()
            self.state = self._state()
            self._leave()

    def _give_up(self, error: BaseException) -> None:
        """Leave the claims to others; the attempt counts, since one of them may have ended us."""
        if isinstance(error, WorkerError) and error.code == "database":
            return  # it would only be waited for again: the leases run out by themselves
        with suppress(WorkerError):
            store.release_worker(self._db, self.worker_id)

    def _leave(self) -> None:
        try:
            store.stop_worker(self._db, self.worker_id)
        except WorkerError as error:  # it will be forgotten, as one that is not seen
            log.warning("worker.unsigned id=%s error=%s", self.worker_id, error)
        log.info("worker.stopped id=%s model=%s", self.worker_id, self._model.folder.name)

    def _turn_or_wait(self) -> None:
        try:
            self._turn()
        except WorkerError as error:
            if error.code != "database" or not self._lasting:
                raise
            # The leases are over, or nothing was held: when it is back, everything is claimed anew.
            log.warning("database.away id=%s error=%s", self.worker_id, error)
            self._engine.close()
            self._blame.forget()
            self._cut_off = [*(self._cut_off or ()), *self._recorder.forget()]
            self._registered = False
            self._stopping.wait(self._settings.poll_seconds)

    def _turn(self) -> None:
        self._show_life()
        if self._cut_off is not None:
            store.excuse(self._db, self.worker_id, self._cut_off)
            self._cut_off = None
        if self._nudged.is_set():
            self._nudged.clear()  # first: who knocks while we look is heard the next time
            self._claim_at = self._chats_at = 0.0
        self._claim()
        self._claim_chats()
        if self._engine.idle:
            self._flush()
            if not self._stopping.is_set():
                self._nudged.wait(self._settings.poll_seconds)
            return
        seeking = self._seeks_suspects
        if self._engine.seated:
            self._counters.step(self._engine.seated, self._engine.slots)
        self._stepping_since = time.monotonic()
        try:
            self._recorder.record(self._blame.step())
        except WorkerError as error:  # whoever is tried fails, even alone: it is the machine
            self._recorder.release(error)
            raise
        finally:
            self._stepping_since = None
        if self._recorder.due or (seeking and not self._engine.halfway):
            self._flush()
            if seeking and not self._recorder.all_clear:
                self._suspects_at = time.monotonic() + _SUSPECTS_INTERVAL_SECONDS
        elif self._recorder.chats_due:
            self._flushed(self._recorder.flush_chats())

    @property
    def _seeks_suspects(self) -> bool:
        """It is time to ask for suspects, but somebody would be suspected with one."""
        now = time.monotonic()
        if now < max(self._suspects_at, self._claim_at) or self._room < 0:
            return False
        quiet = not self._blame.trying and not self._recorder.has_suspect
        return quiet and not self._recorder.all_clear

    @property
    def _room(self) -> int:
        """Choices that may be claimed: half of the slots ahead of need."""
        return self._engine.slots + self._engine.slots // 2 - self._engine.load

    def _claim(self) -> None:
        """Claim in lots of a quarter of the slots at least, half of them ahead of need.

        A suspect, claimed before without one new token, comes when nobody else would be suspected
        with it; until it has stored a token nothing is claimed beside it. Where there is always
        something to do, that moment is looked for every second.
        """
        slots, now, room = self._engine.slots, time.monotonic(), self._room
        enough, due = room >= max(1, slots // 4), room >= 0 and now >= self._suspects_at
        if now < self._claim_at or not (enough or due):
            return
        clear = self._recorder.all_clear
        if self._blame.trying or self._recorder.has_suspect or not (enough or clear):
            return
        claims = self._take(max(room, 1), alone=clear)
        if clear:
            self._suspects_at = now + _SUSPECTS_INTERVAL_SECONDS
        if not claims:
            self._claim_at = self._chats_at = now + self._settings.poll_seconds

    def _claim_chats(self) -> None:
        """Chats are claimed beyond the room for others, when a nudge came, and now and then.

        They are seated before the bulk that was claimed ahead of need. Where there is room for
        all, `_claim` finds them first.
        """
        room, now = self._engine.slots - self._engine.urgent, time.monotonic()
        if now < self._chats_at or room < 1 or self._engine.load < self._engine.slots // 2:
            return
        if self._blame.trying or self._recorder.has_suspect:
            return
        self._chats_at = now + self._settings.poll_seconds
        self._take(room, alone=False, chats=True)

    def _take(self, limit: int, *, alone: bool, chats: bool = False) -> Sequence[store.Claimed]:
        claims = store.claim(
            self._db,
            model=self._model.folder.name,
            worker_id=self.worker_id,
            limit=limit,
            lease_seconds=self._settings.lease_seconds,
            job_id=self._job_id,
            alone=alone,
            chats=chats,
        )
        self._counters.claims.inc(len(claims))
        for claimed in claims:
            self._begin(claimed)
        self._admit(claims)
        return claims

    def _begin(self, claimed: store.Claimed) -> None:
        log.info(
            "request.claimed id=%s epoch=%s model=%s",
            claimed.request_id,
            claimed.epoch,
            claimed.model,
        )
        # Our own lease may have run out: what is still seated belongs to the claim before this one.
        self._blame.cancel(claimed.request_id)
        self._recorder.begin(claimed)

    def _admit(self, claims: Sequence[store.Claimed]) -> None:
        """The longest first."""
        completions: list[Completion] = []
        for claimed in claims:
            if self._recorder.holds(claimed.request_id):  # neither lost nor cancelled meanwhile
                with self._failing(claimed.request_id):
                    completions.append(to_completion(claimed, self._model.wording))
            if self._recorder.since_flush > self._settings.lease_seconds / 3:
                self._flush()  # templates may take their time: the leases of all go on
        for completion in longest_first(completions, self._model.runner.max_length):
            if completion.choices and self._recorder.holds(completion.id):
                with self._failing(completion.id):
                    self._engine.admit(completion)

    @contextmanager
    def _failing(self, request_id: int) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            self._recorder.fail(request_id, error)

    def _flush(self) -> None:
        self._flushed(self._recorder.flush())

    def _flushed(self, gone: frozenset[int]) -> None:
        for request_id in gone:
            self._blame.cancel(request_id)
        self.state = self._state()
        while self._recorder.finished_jobs:
            self._finished(self._recorder.finished_jobs.pop())

    def _show_life(self) -> None:
        if time.monotonic() < self._seen_at and self._registered:
            return
        if not self._registered:
            self._register()
        self._seen_at = time.monotonic() + _SEEN_INTERVAL_SECONDS
        state = self.state = self._state()
        store.see_worker(
            self._db,
            self.worker_id,
            slots=state.slots,
            slots_used=state.slots_used,
            tokens_per_second=state.tokens_per_second,
            memory_bytes=resident_bytes(),
        )

    def _register(self) -> None:
        info = store.WorkerInfo(
            id=self.worker_id,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            model=self._model.folder.name,
            device=self._model.runner.device,
            slots=self._engine.slots,
        )
        store.register_worker(self._db, info)
        self._registered = True

    def _state(self) -> EngineState:
        """Made by this thread alone; others read the finished value."""
        return self._observer.state(len(self._recorder.open), self._recorder.tokens)
