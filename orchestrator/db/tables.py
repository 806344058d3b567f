"""What is known: one class per table, the two views, and the database's clock.

A request's id is its job's number * 10^9 + its position, and so are the ids of points and items:
ordering by id is ordering by (job, position), and a job's rows are one range of ids.

Knows nothing of engines, transactions or who writes when (`database.py`, `store.py`). The schema
is made by `migrations/`; a test holds the two equal.
"""

import json
from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import LargeBinary, TypeDecorator

ROWS_PER_JOB = 10**9
"""Ids of a job's points, items and requests lie in [number * ROWS_PER_JOB, (number + 1) * ...)."""

QUEUED, RUNNING, SUCCEEDED = "queued", "running", "succeeded"
FAILED, CANCELLED = "failed", "cancelled"

# What is queued is in one of these three; SQLite uses the index only for exactly these words.
READY = "state = 'queued' AND retry_at IS NULL AND idle_attempts = 0"
SUSPECT = "state = 'queued' AND retry_at IS NULL AND idle_attempts > 0"
DELAYED = "state = 'queued' AND retry_at IS NOT NULL"


class Instant(TypeDecorator[datetime]):
    """An aware UTC datetime: `timestamptz` on PostgreSQL, UTC text without a zone on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Words(TypeDecorator[str]):
    """Text; PostgreSQL cannot hold U+0000 and stores U+FFFD in its place (token ids stay true)."""

    impl = Text()
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value if value is None else storable(value, dialect.name)


def storable(text: str, dialect: str) -> str:
    """The text as the dialect can hold it; see `Words`."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if dialect == "postgresql" else text


def to_json(value: object) -> str:
    """Compact JSON, readable in SQL; lone surrogates, which UTF-8 cannot hold, stay escaped.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text


class now(FunctionElement[datetime]):
    """The database's clock: the wall time now, not the transaction's start."""

    type = Instant()
    inherit_cache = True


class seconds_from_now(FunctionElement[datetime]):
    """The database's clock plus its one argument, in seconds (may be negative)."""

    type = Instant()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: SQLCompiler, **kw: object) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f', 'now')"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: SQLCompiler, **kw: object) -> str:
    return "clock_timestamp()"


@compiles(seconds_from_now, "sqlite")
def _later_sqlite(element: seconds_from_now, compiler: SQLCompiler, **kw: object) -> str:
    seconds = compiler.process(element.clauses)
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now', ({seconds}) || ' seconds')"


@compiles(seconds_from_now, "postgresql")
def _later_postgresql(element: seconds_from_now, compiler: SQLCompiler, **kw: object) -> str:
    seconds = compiler.process(element.clauses)
    return f"clock_timestamp() + make_interval(secs => CAST({seconds} AS double precision))"


# INTEGER PRIMARY KEY is SQLite's row id itself: no second index.
Id = BigInteger().with_variant(Integer(), "sqlite")
Json = JSON(none_as_null=True)


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


def _index(name: str, columns: tuple[str, ...], where: str) -> Index:
    """An index over some of the requests, kept small by leaving out those that have ended."""
    words = text(where)
    return Index(f"ix_requests_{name}", *columns, sqlite_where=words, postgresql_where=words)


class JobRow(Row):
    """One submitted unit of work. Claimable from `planned_at` on, unless paused or cancelled."""

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
    # Last: on SQLite a column behind a long one costs reading the long one.
    spec: Mapped[dict[str, object]] = mapped_column(Json)
    source: Mapped[str] = mapped_column(Words)
    __table_args__ = (
        Index("ix_jobs_name_number", "name", "number"),
        Index("ix_jobs_model_priority_number", "model", "priority", "number"),
        Index("ix_jobs_deadline_at", "deadline_at"),
        # Those the reconciler asks for: ended, perhaps, but not known to be graded.
        Index(
            "ix_jobs_ungraded",
            "id",
            sqlite_where=text("graded_at IS NULL"),
            postgresql_where=text("graded_at IS NULL"),
        ),
    )


class PointRow(Row):
    """One cell of the sweep; `params` holds only the varied parameters."""

    __tablename__ = "points"
    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=False)
    job_id: Mapped[str] = mapped_column(String(64), _job())
    position: Mapped[int]
    params: Mapped[dict[str, object]] = mapped_column(Json)
    __table_args__ = (UniqueConstraint("job_id", "position"),)


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
        Index("ix_requests_point_id", "point_id"),
        _index("leased_until", ("leased_until",), "state = 'running'"),
        _index("ready", ("job_id", "id"), READY),
        _index("suspect", ("job_id", "id"), SUSPECT),
        _index("delayed", ("retry_at",), DELAYED),
        _index("end_user", ("job_id", "end_user"), "end_user IS NOT NULL"),
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
    __table_args__ = ({"sqlite_with_rowid": False},)


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
)
"""The view `job_status` as Python sees it; the SQL stands in the migrations."""
