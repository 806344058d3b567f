"""Points of graded jobs as they were counted; webhooks that are still to be announced, by an index.

Written out in full and frozen, as every migration. Jobs graded before it have no kept totals and
are counted when they are asked for.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

UNANNOUNCED = "webhook IS NOT NULL AND announced_at IS NULL"


def upgrade() -> None:
    big = _big()
    op.create_table(
        "point_totals",
        sa.Column("point_id", big, nullable=False, autoincrement=False),
        sa.Column("version", sa.String(64), nullable=False),
        *(
            sa.Column(name, big, nullable=False)
            for name in (
                *("succeeded", "failed", "cancelled"),
                *("prompt_tokens", "completion_tokens", "replayed_tokens"),
            )
        ),
        sa.Column("mean_tokens", sa.Double()),
        sa.Column("scores", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("point_id", name="pk_point_totals"),
        sa.ForeignKeyConstraint(
            ["point_id"],
            ["points.id"],
            name="fk_point_totals_point_id_points",
            ondelete="CASCADE",
        ),
    )
    op.add_column("jobs", sa.Column("announced_at", sa.DateTime(timezone=True)))
    op.execute(
        "UPDATE jobs SET announced_at = (SELECT d.created_at FROM deliveries AS d"
        " WHERE d.job_id = jobs.id) WHERE webhook IS NOT NULL"
    )
    words = sa.text(UNANNOUNCED)
    op.create_index(
        "ix_jobs_unannounced", "jobs", ["id"], sqlite_where=words, postgresql_where=words
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_unannounced", table_name="jobs")
    op.drop_column("jobs", "announced_at")
    op.drop_table("point_totals")


def _big() -> sa.types.TypeEngine[int]:
    return sa.Integer() if op.get_bind().dialect.name == "sqlite" else sa.BigInteger()
