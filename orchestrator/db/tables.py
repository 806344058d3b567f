"""What is known: one class per table, and the view that Python reads.

A request's id is its job's number * 10^9 + its position, and so are the ids of points and items:
ordering by id is ordering by (job, position), and a job's rows are one range of ids.

Knows nothing of engines, transactions or who writes when (`database.py`, `store.py`). The schema
is made by `migrations/`; a test holds the two equal.
"""

from datetime import datetime

from sqlalchemy import (
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import LargeBinary

from orchestrator.db.columns import Id, Instant, Json, Words, now

ROWS_PER_JOB = 10**9
"""Ids of a job's points, items and requests lie in [number * ROWS_PER_JOB, (number + 1) * ...)."""

QUEUED, RUNNING, SUCCEEDED = "queued", "running", "succeeded"
FAILED, CANCELLED = "failed", "cancelled"

OPEN_BATCH = (
    "completed_at IS NULL AND failed_at IS NULL AND expired_at IS NULL AND cancelled_at IS NULL"
)
JOB, BATCH, CHAT = "job", "batch", "chat"

# What is queued is in one of these three; SQLite uses the index only for exactly these words.
READY = "state = 'queued' AND retry_at IS NULL AND idle_attempts = 0"
SUSPECT = "state = 'queued' AND retry_at IS NULL AND idle_attempts > 0"
DELAYED = "state = 'queued' AND retry_at IS NOT NULL"
FINISHED = "finish_reason IS NOT NULL"
UNANNOUNCED = "webhook IS NOT NULL AND announced_at IS NULL"


class Row(DeclarativeBase):
    """The base of all tables: one naming convention, so that later migrations can name what is."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def _job() -> ForeignKey:
    return ForeignKey("jobs.id", ondelete="CASCADE")


def _request() -> ForeignKey:
    return ForeignKey("requests.id", ondelete="CASCADE")


def _index(name: str, columns: tuple[str, ...], where: str, table: str = "requests") -> Index:
    """An index over some of the rows, kept small by leaving out the others."""
    words = text(where)
    return Index(f"ix_{table}_{name}", *columns, sqlite_where=words, postgresql_where=words)


class JobRow(Row):
    """One submitted unit of work. Claimable from `planned_at` on, unless paused or cancelled.

    `kind`: `job` from a YAML file; of a `batch` or a `chat` each item's columns are the whole
    parameters of its requests, word for word. `owner`: whose it is, empty for the machine's own.
    `handle`: the completion's id of a `chat`. `webhook`: {url, secret}, told when it has ended.
    `ended_at`: when a reconciler found that every request had ended; NULL again after a retry.
    `announced_at`: when its webhook's delivery was made, once for good; read by an index only.
    """

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(Id, unique=True)
    name: Mapped[str] = mapped_column(Words)
    model: Mapped[str] = mapped_column(Words)
    priority: Mapped[int]
    seed: Mapped[int] = mapped_column(Id)
    digest: Mapped[str] = mapped_column(String(64))
    n_items: Mapped[int] = mapped_column(Id)
    n_points: Mapped[int] = mapped_column(Id)
    n_requests: Mapped[int] = mapped_column(Id)
    n_choices: Mapped[int] = mapped_column(Id)
    created_at: Mapped[datetime] = mapped_column(Instant, server_default=now())
    planned_at: Mapped[datetime | None] = mapped_column(Instant)
    paused_at: Mapped[datetime | None] = mapped_column(Instant)
    cancelled_at: Mapped[datetime | None] = mapped_column(Instant)
    deadline_at: Mapped[datetime | None] = mapped_column(Instant)
    graded_at: Mapped[datetime | None] = mapped_column(Instant)
    cancel_reason: Mapped[str | None] = mapped_column(Words)
    max_parallel: Mapped[int | None]
    max_attempts: Mapped[int] = mapped_column(server_default="5")
    kind: Mapped[str] = mapped_column(String(8), server_default=JOB)
    owner: Mapped[str] = mapped_column(String(100), server_default="")
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    handle: Mapped[str | None] = mapped_column(String(64))
    webhook: Mapped[dict[str, object] | None] = mapped_column(Json)
    ended_at: Mapped[datetime | None] = mapped_column(Instant)
    # Last: on SQLite a column behind a long one costs reading the long one.
    spec: Mapped[dict[str, object]] = mapped_column(Json)
    source: Mapped[str] = mapped_column(Words)
    announced_at: Mapped[datetime | None] = mapped_column(Instant)
    __table_args__ = (
        Index("ix_jobs_name_number", "name", "number"),
        Index("ix_jobs_model_priority_number", "model", "priority", "number"),
        Index("ix_jobs_deadline_at", "deadline_at"),
        Index("ix_jobs_kind_number", "kind", "number"),
        Index("ix_jobs_owner_number", "owner", "number"),
        Index(
            "uq_jobs_idempotency",
            "owner",
            "idempotency_key",
            unique=True,
            sqlite_where=text("idempotency_key IS NOT NULL"),
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        Index(
            "uq_jobs_handle",
            "handle",
            unique=True,
            sqlite_where=text("handle IS NOT NULL"),
            postgresql_where=text("handle IS NOT NULL"),
        ),
        # Those the reconciler asks for: ended, perhaps, but not known to have, or to be graded.
        Index(
            "ix_jobs_going_on",
            "id",
            sqlite_where=text("ended_at IS NULL"),
            postgresql_where=text("ended_at IS NULL"),
        ),
        Index(
            "ix_jobs_ungraded",
            "id",
            sqlite_where=text("graded_at IS NULL"),
            postgresql_where=text("graded_at IS NULL"),
        ),
        _index("unannounced", ("id",), UNANNOUNCED, table="jobs"),
    )


class PointRow(Row):
    """One cell of the sweep; `params` holds only the varied parameters."""

    __tablename__ = "points"
    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=False)
    job_id: Mapped[str] = mapped_column(String(64), _job())
    position: Mapped[int]
    params: Mapped[dict[str, object]] = mapped_column(Json)
    __table_args__ = (UniqueConstraint("job_id", "position"),)


class PointTotalRow(Row):
    """What was counted of one point of a graded job, true while the job's version is `version`."""

    __tablename__ = "point_totals"
    point_id: Mapped[int] = mapped_column(
        Id, ForeignKey("points.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    version: Mapped[str] = mapped_column(String(64))
    succeeded: Mapped[int] = mapped_column(Id)
    failed: Mapped[int] = mapped_column(Id)
    cancelled: Mapped[int] = mapped_column(Id)
    prompt_tokens: Mapped[int] = mapped_column(Id)
    completion_tokens: Mapped[int] = mapped_column(Id)
    replayed_tokens: Mapped[int] = mapped_column(Id)
    mean_tokens: Mapped[float | None]
    scores: Mapped[dict[str, list[float]]] = mapped_column(Json)


class ItemRow(Row):
    """One row of the dataset; `columns` is what the templates saw."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=False)
    job_id: Mapped[str] = mapped_column(String(64), _job())
    position: Mapped[int]
    custom_id: Mapped[str] = mapped_column(Words)
    columns: Mapped[dict[str, object]] = mapped_column(Json)
    __table_args__ = (
        UniqueConstraint("job_id", "position"),
        UniqueConstraint("job_id", "custom_id"),
    )


class RequestRow(Row):
    """One item at one point. `epoch` is the fence: a claim raises it, every write names it.

    `idle_attempts` are claims in a row without one new token; `excused` is how many of these ended
    with the database away. `end_user` is the parameter `user`; `warnings` say what of the request
    could not be kept to.
    """

    __tablename__ = "requests"
    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=False)
    job_id: Mapped[str] = mapped_column(String(64), _job())
    item_id: Mapped[int] = mapped_column(Id, ForeignKey("items.id", ondelete="CASCADE"))
    point_id: Mapped[int] = mapped_column(Id, ForeignKey("points.id", ondelete="CASCADE"))
    state: Mapped[str] = mapped_column(String(16), server_default=QUEUED)
    epoch: Mapped[int] = mapped_column(server_default="0")
    seed: Mapped[int] = mapped_column(Id)
    n: Mapped[int]
    attempt: Mapped[int] = mapped_column(server_default="0")
    idle_attempts: Mapped[int] = mapped_column(server_default="0")
    excused: Mapped[int] = mapped_column(server_default="0")
    leased_until: Mapped[datetime | None] = mapped_column(Instant)
    worker_id: Mapped[str | None] = mapped_column(String(200))
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Words)
    system_fingerprint: Mapped[str | None] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(Instant, server_default=now())
    started_at: Mapped[datetime | None] = mapped_column(Instant)
    finished_at: Mapped[datetime | None] = mapped_column(Instant)
    retry_at: Mapped[datetime | None] = mapped_column(Instant)
    failures: Mapped[int] = mapped_column(server_default="0")
    end_user: Mapped[str | None] = mapped_column(Words)
    warnings: Mapped[list[str] | None] = mapped_column(Json)
    __table_args__ = (
        Index("ix_requests_job_id_state_id", "job_id", "state", "id"),
        Index("ix_requests_item_id", "item_id"),
        Index("ix_requests_point_id", "point_id", "id"),
        _index("leased_until", ("leased_until",), "state = 'running'"),
        _index("ready", ("job_id", "id"), READY),
        _index("suspect", ("job_id", "id"), SUSPECT),
        _index("delayed", ("retry_at",), DELAYED),
        _index("end_user", ("job_id", "end_user"), "end_user IS NOT NULL"),
        _index("error_code", ("job_id", "error_code", "id"), "error_code IS NOT NULL"),
        _index("finished_at", ("job_id", "finished_at", "id"), "finished_at IS NOT NULL"),
    )


class TurnRow(Row):
    """When the job was last served: the higher `turn`, the later; a clock that claims advance."""

    __tablename__ = "turns"
    job_id: Mapped[str] = mapped_column(String(64), _job(), primary_key=True)
    turn: Mapped[int] = mapped_column(Id, server_default="0")
    __table_args__ = ({"sqlite_with_rowid": False},)


class ChoiceRow(Row):
    """One of a request's n completions; `n_tokens` is the sum over its chunks."""

    __tablename__ = "choices"
    request_id: Mapped[int] = mapped_column(Id, _request(), primary_key=True, autoincrement=False)
    choice: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    n_tokens: Mapped[int] = mapped_column(server_default="0")
    finish_reason: Mapped[str | None] = mapped_column(String(32))
    text: Mapped[str | None] = mapped_column(Words)
    __table_args__ = (
        _index("finish_reason", ("finish_reason", "request_id"), FINISHED, table="choices"),
        {"sqlite_with_rowid": False},
    )


class ChunkRow(Row):
    """What one flush stored of one choice. `token_ids`: little-endian int32, 4 bytes a token.

    `calls`: what came of calls, after the text: {index, name, arguments: ""} opens one,
    {index, arguments} goes on with it. `position` rises, with gaps, in the order in which the
    chunks of a request, of all its choices, were stored.
    """

    __tablename__ = "chunks"
    request_id: Mapped[int] = mapped_column(Id, _request(), primary_key=True, autoincrement=False)
    choice: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    token_start: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    n_tokens: Mapped[int]
    token_ids: Mapped[bytes] = mapped_column(LargeBinary)
    text: Mapped[str] = mapped_column(Words)
    logprobs: Mapped[list[dict[str, object]] | None] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(Instant, server_default=now())
    calls: Mapped[list[dict[str, object]] | None] = mapped_column(Json)
    position: Mapped[int] = mapped_column(server_default="0")
    __table_args__ = ({"sqlite_with_rowid": False},)


class UsageRow(Row):
    """Tokens spent by one attempt; `completion_tokens` are new ones, `replayed_tokens` in vain."""

    __tablename__ = "usage"
    request_id: Mapped[int] = mapped_column(Id, _request(), primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    prompt_tokens: Mapped[int]
    cached_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    replayed_tokens: Mapped[int]
    worker_id: Mapped[str | None] = mapped_column(String(200))
    __table_args__ = ({"sqlite_with_rowid": False},)


class ScoreRow(Row):
    """What one grader said of one choice."""

    __tablename__ = "scores"
    request_id: Mapped[int] = mapped_column(Id, _request(), primary_key=True, autoincrement=False)
    choice: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    grader: Mapped[str] = mapped_column(String(200), primary_key=True)
    score: Mapped[float]
    detail: Mapped[str | None] = mapped_column(Words)
    __table_args__ = ({"sqlite_with_rowid": False},)


class TallyRow(Row):
    """What triggers add up of a job, by its number: requests by state, tokens, the first start.

    A job's sums over its rows are what counting its requests and usage would give. `second`: when
    it changed, in Unix seconds rounded down to ten; 0 for what was folded together since.
    """

    __tablename__ = "tallies"
    id: Mapped[int] = mapped_column(Id, primary_key=True)
    number: Mapped[int] = mapped_column(Id)
    second: Mapped[int] = mapped_column(Id, server_default="0")
    requests: Mapped[int] = mapped_column(Id, server_default="0")
    queued: Mapped[int] = mapped_column(Id, server_default="0")
    running: Mapped[int] = mapped_column(Id, server_default="0")
    succeeded: Mapped[int] = mapped_column(Id, server_default="0")
    failed: Mapped[int] = mapped_column(Id, server_default="0")
    cancelled: Mapped[int] = mapped_column(Id, server_default="0")
    prompt_tokens: Mapped[int] = mapped_column(Id, server_default="0")
    cached_tokens: Mapped[int] = mapped_column(Id, server_default="0")
    completion_tokens: Mapped[int] = mapped_column(Id, server_default="0")
    replayed_tokens: Mapped[int] = mapped_column(Id, server_default="0")
    started_at: Mapped[datetime | None] = mapped_column(Instant)
    __table_args__ = (
        Index("ix_tallies_number_second", "number", "second"),
        Index("ix_tallies_second_number", "second", "number"),
    )


class EventRow(Row):
    """What happened to a job, in words: submitted, started, paused, resumed, ..., ended."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(String(64), _job())
    at: Mapped[datetime] = mapped_column(Instant, server_default=now())
    event: Mapped[str] = mapped_column(String(32))
    detail: Mapped[str | None] = mapped_column(Words)
    __table_args__ = (
        Index("ix_events_job_id_id", "job_id", "id"),
        Index(
            "uq_events_started",
            "job_id",
            unique=True,
            sqlite_where=text("event = 'started'"),
            postgresql_where=text("event = 'started'"),
        ),
    )


class KeyRow(Row):
    """One API key: SHA-256 of it, what it may do (words apart by spaces), whose it is."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(100))
    name: Mapped[str] = mapped_column(Words)
    prefix: Mapped[str] = mapped_column(String(16))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[datetime] = mapped_column(Instant, server_default=now())
    last_used_at: Mapped[datetime | None] = mapped_column(Instant)
    revoked_at: Mapped[datetime | None] = mapped_column(Instant)


class FileRow(Row):
    """One file of a batch; its bytes lie in the files' folder under its id."""

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(100), server_default="")
    filename: Mapped[str] = mapped_column(Words)
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(Id)
    created_at: Mapped[datetime] = mapped_column(Instant, server_default=now())
    expires_at: Mapped[datetime | None] = mapped_column(Instant)
    deleted_at: Mapped[datetime | None] = mapped_column(Instant)
    __table_args__ = (
        Index("ix_files_owner_created_at_id", "owner", "created_at", "id"),
        Index("ix_files_expires_at", "expires_at"),
    )


class BatchRow(Row):
    """One batch of the OpenAI surface; its requests are those of the job, once it is validated."""

    __tablename__ = "batches"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(100), server_default="")
    job_id: Mapped[str | None] = mapped_column(
        String(64), ForeignKey("jobs.id", ondelete="SET NULL")
    )
    endpoint: Mapped[str] = mapped_column(String(64))
    model: Mapped[str | None] = mapped_column(Words)
    input_file_id: Mapped[str] = mapped_column(String(64))
    output_file_id: Mapped[str | None] = mapped_column(String(64))
    error_file_id: Mapped[str | None] = mapped_column(String(64))
    completion_window: Mapped[str] = mapped_column(String(16))
    output_expires_seconds: Mapped[int | None]
    lines: Mapped[int] = mapped_column(server_default="0")
    created_at: Mapped[datetime] = mapped_column(Instant, server_default=now())
    expires_at: Mapped[datetime] = mapped_column(Instant)
    in_progress_at: Mapped[datetime | None] = mapped_column(Instant)
    finalizing_at: Mapped[datetime | None] = mapped_column(Instant)
    completed_at: Mapped[datetime | None] = mapped_column(Instant)
    failed_at: Mapped[datetime | None] = mapped_column(Instant)
    expired_at: Mapped[datetime | None] = mapped_column(Instant)
    cancelling_at: Mapped[datetime | None] = mapped_column(Instant)
    cancelled_at: Mapped[datetime | None] = mapped_column(Instant)
    leased_until: Mapped[datetime | None] = mapped_column(Instant)
    errors: Mapped[list[dict[str, object]] | None] = mapped_column(Json)
    details: Mapped[dict[str, object] | None] = mapped_column("metadata", Json)
    __table_args__ = (
        Index("ix_batches_owner_created_at_id", "owner", "created_at", "id"),
        Index("ix_batches_job_id", "job_id"),
        Index(
            "ix_batches_open",
            "created_at",
            sqlite_where=text(OPEN_BATCH),
            postgresql_where=text(OPEN_BATCH),
        ),
    )


class DeliveryRow(Row):
    """One webhook of a job that has ended: sent until it was taken, or given up."""

    __tablename__ = "deliveries"
    id: Mapped[int] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(String(64), _job(), unique=True)
    created_at: Mapped[datetime] = mapped_column(Instant, server_default=now())
    attempts: Mapped[int] = mapped_column(server_default="0")
    next_at: Mapped[datetime | None] = mapped_column(Instant, server_default=now())
    delivered_at: Mapped[datetime | None] = mapped_column(Instant)
    failed_at: Mapped[datetime | None] = mapped_column(Instant)
    last_status: Mapped[int | None]
    last_error: Mapped[str | None] = mapped_column(Words)
    __table_args__ = (Index("ix_deliveries_next_at", "next_at"),)


class WorkerRow(Row):
    """One engine of a process; the last three are what it reported when it was last seen."""

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    hostname: Mapped[str] = mapped_column(Words)
    pid: Mapped[int]
    model: Mapped[str] = mapped_column(Words)
    device: Mapped[str] = mapped_column(String(64))
    slots: Mapped[int]
    started_at: Mapped[datetime] = mapped_column(Instant, server_default=now())
    seen_at: Mapped[datetime] = mapped_column(Instant, server_default=now())
    stopped_at: Mapped[datetime | None] = mapped_column(Instant)
    slots_used: Mapped[int | None]
    tokens_per_second: Mapped[float | None]
    memory_bytes: Mapped[int | None] = mapped_column(Id)


_views = MetaData()

job_status = Table(
    "job_status",
    _views,
    Column("id", String),
    Column("name", String),
    Column("model", String),
    Column("state", String),
    *(
        Column(name, Integer)
        for name in (
            *("requests", "queued", "running", "succeeded", "failed", "cancelled"),
            *("prompt_tokens", "completion_tokens", "replayed_tokens"),
        )
    ),
    Column("created_at", Instant),
    Column("finished_at", Instant),
    Column("cancel_reason", String),
    Column("deadline_at", Instant),
    Column("number", Integer),
    Column("kind", String),
    Column("owner", String),
    Column("cached_tokens", Integer),
    Column("started_at", Instant),
)
"""The view `job_status` as Python sees it; the SQL stands in the migrations."""
