"""Whose a job is and of which kind; events, API keys, files, batches, webhooks.

Written out in full and frozen, as every migration. On SQLite `jobs` is made anew, so that the new
columns stand before the long ones (a column behind a long one costs reading the long one).
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

KEYED = "idempotency_key IS NOT NULL"
HANDLED = "handle IS NOT NULL"
OPEN_BATCH = (
    "completed_at IS NULL AND failed_at IS NULL AND expired_at IS NULL AND cancelled_at IS NULL"
)


def upgrade() -> None:
    views = _drop_views()
    _jobs()
    _events()
    _keys()
    _files()
    _batches()
    _deliveries()
    for view in views:
        op.execute(view)


def downgrade() -> None:
    for table in ("deliveries", "batches", "files", "api_keys", "events"):
        op.drop_table(table)
    for index in (
        *("ix_jobs_going_on", "uq_jobs_handle", "uq_jobs_idempotency", "ix_jobs_owner_number"),
    ):
        op.drop_index(index, table_name="jobs")
    op.drop_index("ix_jobs_kind_number", table_name="jobs")
    views = _drop_views()
    for name in ("ended_at", "webhook", "handle", "idempotency_key", "owner", "kind"):
        op.drop_column("jobs", name)
    for view in views:
        op.execute(view)


def _sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _big() -> sa.types.TypeEngine[int]:
    return sa.Integer() if _sqlite() else sa.BigInteger()


def _drop_views() -> list[str]:
    """On SQLite a table cannot be made anew under a view: how to make them again."""
    if not _sqlite():
        return []
    made = op.get_bind().execute(sa.text("SELECT name, sql FROM sqlite_master WHERE type = 'view'"))
    found = made.all()
    for name, _ in found:
        op.execute(f"DROP VIEW {name}")
    return [sql for _, sql in found]


def _jobs() -> None:
    columns = (
        sa.Column("kind", sa.String(8), nullable=False, server_default="job"),
        sa.Column("owner", sa.String(100), nullable=False, server_default=""),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("handle", sa.String(64)),
        sa.Column("webhook", sa.JSON()),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
    )
    after = "max_attempts"
    with op.batch_alter_table("jobs", recreate="always" if _sqlite() else "never") as batch:
        for column in columns:
            batch.add_column(column, **({"insert_after": after} if _sqlite() else {}))
            after = column.name
    op.create_index("ix_jobs_kind_number", "jobs", ["kind", "number"])
    op.create_index("ix_jobs_owner_number", "jobs", ["owner", "number"])
    _unique("uq_jobs_idempotency", ["owner", "idempotency_key"], KEYED)
    _unique("uq_jobs_handle", ["handle"], HANDLED)
    op.execute(_ENDED)
    going_on = sa.text("ended_at IS NULL")
    op.create_index(
        "ix_jobs_going_on", "jobs", ["id"], sqlite_where=going_on, postgresql_where=going_on
    )


# Those that had ended before anybody wrote it down.
_ENDED = """
UPDATE jobs SET ended_at = coalesce(
    (SELECT max(finished_at) FROM requests WHERE requests.job_id = jobs.id), created_at
)
WHERE planned_at IS NOT NULL AND NOT EXISTS (
    SELECT 1 FROM requests WHERE requests.job_id = jobs.id AND state IN ('queued', 'running')
)
"""


def _unique(name: str, columns: list[str], where: str) -> None:
    words = sa.text(where)
    op.create_index(name, "jobs", columns, unique=True, sqlite_where=words, postgresql_where=words)


def _now() -> sa.TextClause:
    words = "strftime('%Y-%m-%d %H:%M:%f', 'now')" if _sqlite() else "clock_timestamp()"
    return sa.text(f"({words})" if _sqlite() else words)


def _time(name: str, *, now: bool = False, needed: bool = False) -> sa.Column[object]:
    default = _now() if now else None
    return sa.Column(name, sa.DateTime(timezone=True), nullable=not needed, server_default=default)


def _of_job(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["job_id"], ["jobs.id"], name=f"fk_{table}_job_id_jobs", ondelete="CASCADE"
    )


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("id", _big(), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        _time("at", now=True, needed=True),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("detail", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
        _of_job("events"),
    )
    op.create_index("ix_events_job_id_id", "events", ["job_id", "id"])
    first = sa.text("event = 'started'")
    op.create_index(
        *("uq_events_started", "events", ["job_id"]),
        unique=True,
        sqlite_where=first,
        postgresql_where=first,
    )


def _keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(100), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.String(16), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("scopes", sa.String(100), nullable=False),
        _time("created_at", now=True, needed=True),
        _time("last_used_at"),
        _time("revoked_at"),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("hash", name="uq_api_keys_hash"),
    )


def _files() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(100), nullable=False, server_default=""),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("bytes", _big(), nullable=False),
        _time("created_at", now=True, needed=True),
        _time("expires_at"),
        _time("deleted_at"),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
    )
    op.create_index("ix_files_owner_created_at_id", "files", ["owner", "created_at", "id"])
    op.create_index("ix_files_expires_at", "files", ["expires_at"])


def _batches() -> None:
    op.create_table(
        "batches",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(100), nullable=False, server_default=""),
        sa.Column("job_id", sa.String(64)),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("model", sa.Text()),
        sa.Column("input_file_id", sa.String(64), nullable=False),
        sa.Column("output_file_id", sa.String(64)),
        sa.Column("error_file_id", sa.String(64)),
        sa.Column("completion_window", sa.String(16), nullable=False),
        sa.Column("output_expires_seconds", sa.Integer()),
        sa.Column("lines", sa.Integer(), nullable=False, server_default="0"),
        _time("created_at", now=True, needed=True),
        _time("expires_at", needed=True),
        *(
            _time(name)
            for name in (
                *("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at"),
                *("cancelling_at", "cancelled_at", "leased_until"),
            )
        ),
        sa.Column("errors", sa.JSON()),
        sa.Column("metadata", sa.JSON()),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_batches_job_id_jobs", ondelete="SET NULL"
        ),
    )
    op.create_index("ix_batches_owner_created_at_id", "batches", ["owner", "created_at", "id"])
    op.create_index("ix_batches_job_id", "batches", ["job_id"])
    words = sa.text(OPEN_BATCH)
    op.create_index(
        "ix_batches_open", "batches", ["created_at"], sqlite_where=words, postgresql_where=words
    )


def _deliveries() -> None:
    op.create_table(
        "deliveries",
        sa.Column("id", _big(), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        _time("created_at", now=True, needed=True),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
        _time("next_at", now=True),
        _time("delivered_at"),
        _time("failed_at"),
        sa.Column("last_status", sa.Integer()),
        sa.Column("last_error", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_deliveries"),
        sa.UniqueConstraint("job_id", name="uq_deliveries_job_id"),
        _of_job("deliveries"),
    )
    op.create_index("ix_deliveries_next_at", "deliveries", ["next_at"])
