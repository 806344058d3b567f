"""Totals of points: counted, and those of a graded big job kept, so that it opens as a small one.

Each kept row names the version of its job (`listing.version`) that was read before it was counted,
and is true as long as the job has that version: whatever begins a job again or scores it anew
changes it. Knows nothing of how points are counted (`points.py`).
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from orchestrator.db.database import Database
from orchestrator.db.listing import version_seen
from orchestrator.db.points import Point, PointTotals, counted, planned_points
from orchestrator.db.tables import JobRow, PointTotalRow

WORTH_KEEPING = 10_000
"""Requests from which on the points of a job are kept; fewer are counted in milliseconds."""
_ROWS_A_WRITE = 500

_SAME = (
    *("succeeded", "failed", "cancelled"),
    *("prompt_tokens", "completion_tokens", "replayed_tokens", "mean_tokens"),
)


def points_page(
    db: Database, job_id: str, *, after: int = -1, limit: int = 100
) -> list[PointTotals]:
    """The job's points in order, those after the position `after`. Raises NotFound."""
    with db.read() as rows:
        points = planned_points(rows, job_id, after=after, limit=limit)
        return _kept(rows, job_id, points) or counted(rows, points)


def keep_points(db: Database, job_id: str, *, least: int = WORTH_KEEPING) -> int:
    """Count the points of a graded job of `least` requests or more, and keep that; how many."""
    with db.read() as rows:
        wanted = select(JobRow.id).where(JobRow.id == job_id, JobRow.n_requests >= least)
        if rows.scalar(wanted.where(JobRow.graded_at.is_not(None))) is None:
            return 0
        version = version_seen(rows, job_id)  # first: what changes from here on makes it another
        totals = counted(rows, planned_points(rows, job_id))
    for lot in range(0, len(totals), _ROWS_A_WRITE):
        _keep(db, version, totals[lot : lot + _ROWS_A_WRITE])
    return len(totals)


def _keep(db: Database, version: str, totals: Sequence[PointTotals]) -> None:
    insert = sqlite_insert if db.dialect == "sqlite" else postgresql_insert
    added = insert(PointTotalRow)
    names = ("version", *_SAME, "scores")
    kept = added.on_conflict_do_update(
        index_elements=["point_id"], set_={name: added.excluded[name] for name in names}
    )
    values = [
        {
            "point_id": each.id,
            "version": version,
            **{name: getattr(each, name) for name in _SAME},
            "scores": {grader: list(score) for grader, score in each.scores.items()},
        }
        for each in totals
    ]
    with db.write() as tx:
        tx.execute(kept, values)


def _kept(rows: Connection, job_id: str, points: Sequence[Point]) -> list[PointTotals]:
    """What is kept of these points; nothing where one lacks, or the job is another by now."""
    if not points:
        return []
    mine = select(PointTotalRow.__table__).where(
        PointTotalRow.point_id.between(points[0].id, points[-1].id)
    )
    found = rows.execute(mine.order_by(PointTotalRow.point_id)).all()
    if len(found) != len(points):
        return []
    version = version_seen(rows, job_id)
    if any(row.version != version for row in found):
        return []
    return [_totals(point, row) for point, row in zip(points, found, strict=True)]


def _totals(point: Point, row: Row[Any]) -> PointTotals:
    ended = row.succeeded + row.failed + row.cancelled
    return PointTotals(
        *point,
        requests=ended,
        queued=0,
        running=0,
        **{name: getattr(row, name) for name in _SAME},
        scores={grader: (mean, int(count)) for grader, (mean, count) in row.scores.items()},
    )
