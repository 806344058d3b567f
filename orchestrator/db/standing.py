"""All that is asked of a job while it is watched, read at once: where it stands, pace, waiting.

One transaction, whose statements are the few that its parts need: what is asked every second by
everybody must not cost a connection for each part. Knows nothing of how it is shown.
"""

from dataclasses import dataclass

from orchestrator.db.database import Database
from orchestrator.db.listing import JobStatus, status_seen
from orchestrator.db.tallies import Pace, pace_seen
from orchestrator.db.waiting import Waiting, waiting_seen

_GOES_ON = ("queued", "running", "paused")


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands; of one that has ended, no pace and nothing that waits."""

    status: JobStatus
    version: str
    pace: Pace
    waiting: Waiting


def standing(db: Database, job_id: str) -> Standing:
    """The job's status, its version (of the same row), its pace, what it waits for.

    Raises NotFound.
    """
    with db.read() as rows:
        status, version = status_seen(rows, job_id)
        if status.state not in _GOES_ON:
            return Standing(status, version, Pace(None, None, 0.0), Waiting(()))
        pace = pace_seen(rows, job_id)
        waits = waiting_seen(rows, job_id) if status.queued else Waiting(())
    return Standing(status, version, pace, waits)
