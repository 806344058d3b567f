"""Calls beside the text, warnings, whom a request was made for, attempts that do not count.

Written out in full and frozen, as every migration.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

END_USER = "end_user IS NOT NULL"


def upgrade() -> None:
    op.add_column("chunks", sa.Column("calls", sa.JSON()))
    op.add_column("chunks", _counter("position"))
    op.add_column("requests", _counter("excused"))
    op.add_column("requests", sa.Column("end_user", sa.Text()))
    op.add_column("requests", sa.Column("warnings", sa.JSON()))
    op.create_index(
        "ix_requests_end_user",
        "requests",
        ["job_id", "end_user"],
        sqlite_where=sa.text(END_USER),
        postgresql_where=sa.text(END_USER),
    )


def downgrade() -> None:
    op.drop_index("ix_requests_end_user", table_name="requests")
    for name in ("warnings", "end_user", "excused"):
        op.drop_column("requests", name)
    for name in ("position", "calls"):
        op.drop_column("chunks", name)


def _counter(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False, server_default="0")
