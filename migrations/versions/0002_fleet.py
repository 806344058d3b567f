"""Many workers: when to try again, limits of a job, whose turn it is, what a worker reports.

Written out in full and frozen, as every migration. On SQLite `jobs` is made anew, so that the new
columns stand before the long ones (a column behind a long one costs reading the long one).
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

READY = "state = 'queued' AND retry_at IS NULL AND idle_attempts = 0"
SUSPECT = "state = 'queued' AND retry_at IS NULL AND idle_attempts > 0"
DELAYED = "state = 'queued' AND retry_at IS NOT NULL"


def upgrade() -> None:
    other = _drop_views()
    _jobs()
    _requests()
    _turns()
    _workers()
    more = "cancel_reason", "deadline_at"
    op.execute(_job_status(*more))
    if other:
        op.execute(other)


def downgrade() -> None:
    other = _drop_views()
    op.drop_table("turns")
    for name in ("memory_bytes", "tokens_per_second", "slots_used"):
        op.drop_column("workers", name)
    for columns in ("ready", "suspect", "delayed"):
        op.drop_index(f"ix_requests_{columns}", table_name="requests")
    for name in ("failures", "retry_at"):
        op.drop_column("requests", name)
    op.drop_index("ix_jobs_ungraded", table_name="jobs")
    op.drop_index("ix_jobs_deadline_at", table_name="jobs")
    for name in ("max_attempts", "max_parallel", "cancel_reason", "graded_at", "deadline_at"):
        op.drop_column("jobs", name)
    op.execute(_job_status())
    if other:
        op.execute(other)


def _sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _big() -> sa.types.TypeEngine[int]:
    return sa.Integer() if _sqlite() else sa.BigInteger()


def _drop_views() -> str | None:
    """Drop the views on what changes; how to make the other one again, where it had to go too."""
    op.execute("DROP VIEW job_status")
    if not _sqlite():
        return None
    # A table cannot be made anew under a view on SQLite.
    made = sa.text("SELECT sql FROM sqlite_master WHERE name = 'request_text'")
    other: str | None = op.get_bind().scalar(made)
    op.execute("DROP VIEW request_text")
    return other


def _jobs() -> None:
    columns = (
        sa.Column("deadline_at", sa.DateTime(timezone=True)),
        sa.Column("graded_at", sa.DateTime(timezone=True)),
        sa.Column("cancel_reason", sa.Text()),
        sa.Column("max_parallel", sa.Integer()),
        sa.Column("max_attempts", sa.Integer(), nullable=False, server_default="5"),
    )
    after = "cancelled_at"
    with op.batch_alter_table("jobs", recreate="always" if _sqlite() else "never") as batch:
        for column in columns:
            batch.add_column(column, **({"insert_after": after} if _sqlite() else {}))
            after = column.name
    op.create_index("ix_jobs_deadline_at", "jobs", ["deadline_at"])
    ungraded = sa.text("graded_at IS NULL")
    op.create_index(
        "ix_jobs_ungraded", "jobs", ["id"], sqlite_where=ungraded, postgresql_where=ungraded
    )


def _requests() -> None:
    op.add_column("requests", sa.Column("retry_at", sa.DateTime(timezone=True)))
    op.add_column(
        "requests", sa.Column("failures", sa.Integer(), nullable=False, server_default="0")
    )
    for name, columns, where in (
        ("ready", ["job_id", "id"], READY),
        ("suspect", ["job_id", "id"], SUSPECT),
        ("delayed", ["retry_at"], DELAYED),
    ):
        op.create_index(
            f"ix_requests_{name}",
            "requests",
            columns,
            sqlite_where=sa.text(where),
            postgresql_where=sa.text(where),
        )


def _turns() -> None:
    op.create_table(
        "turns",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("turn", _big(), nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("job_id", name="pk_turns"),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_turns_job_id_jobs", ondelete="CASCADE"
        ),
        sqlite_with_rowid=False,
    )
    op.execute("INSERT INTO turns (job_id) SELECT id FROM jobs")


def _workers() -> None:
    op.add_column("workers", sa.Column("slots_used", sa.Integer()))
    op.add_column("workers", sa.Column("tokens_per_second", sa.Double()))
    op.add_column("workers", sa.Column("memory_bytes", _big()))


# A request's prompt counts once, however many attempts prefilled it.
def _job_status(*columns: str) -> str:
    """The view, with these columns of the job at its end."""
    outer = "".join(f", c.{name}" for name in columns)
    inner = "".join(f" j.{name}," for name in columns)
    return f"""
CREATE VIEW job_status AS
SELECT c.id, c.name, c.model,
    CASE
        WHEN c.paused_at IS NOT NULL AND c.queued + c.running > 0 THEN 'paused'
        WHEN c.cancelled_at IS NOT NULL AND c.running = 0 THEN 'cancelled'
        WHEN c.queued = c.requests THEN 'queued'
        WHEN c.queued + c.running > 0 THEN 'running'
        WHEN c.succeeded = c.requests THEN 'succeeded'
        WHEN c.failed = c.requests THEN 'failed'
        ELSE 'partial'
    END AS state,
    c.requests, c.queued, c.running, c.succeeded, c.failed, c.cancelled,
    (
        SELECT coalesce(sum(p.prompt_tokens), 0)
        FROM (
            SELECT max(u.prompt_tokens) AS prompt_tokens
            FROM usage AS u
            WHERE u.request_id >= c.number * 1000000000
                AND u.request_id < (c.number + 1) * 1000000000
            GROUP BY u.request_id
        ) AS p
    ) AS prompt_tokens,
    (
        SELECT coalesce(sum(u.completion_tokens), 0)
        FROM usage AS u
        WHERE u.request_id >= c.number * 1000000000
            AND u.request_id < (c.number + 1) * 1000000000
    ) AS completion_tokens,
    (
        SELECT coalesce(sum(u.replayed_tokens), 0)
        FROM usage AS u
        WHERE u.request_id >= c.number * 1000000000
            AND u.request_id < (c.number + 1) * 1000000000
    ) AS replayed_tokens,
    c.created_at,
    CASE WHEN c.queued + c.running = 0 THEN c.last_finished_at END AS finished_at{outer}
FROM (
    SELECT j.id, j.number, j.name, j.model, j.paused_at, j.cancelled_at, j.created_at,{inner}
        count(*) AS requests,
        sum(CASE WHEN r.state = 'queued' THEN 1 ELSE 0 END) AS queued,
        sum(CASE WHEN r.state = 'running' THEN 1 ELSE 0 END) AS running,
        sum(CASE WHEN r.state = 'succeeded' THEN 1 ELSE 0 END) AS succeeded,
        sum(CASE WHEN r.state = 'failed' THEN 1 ELSE 0 END) AS failed,
        sum(CASE WHEN r.state = 'cancelled' THEN 1 ELSE 0 END) AS cancelled,
        max(r.finished_at) AS last_finished_at
    FROM jobs AS j
    JOIN requests AS r ON r.job_id = j.id
    WHERE j.planned_at IS NOT NULL
    GROUP BY j.id
) AS c
"""  # noqa: S608
