"""Requests and jobs that somebody follows: one look at the rows serves all who wait.

Knows nothing of HTTP, nor of how news become events.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence

from orchestrator.api.waits import Poller, Stopped
from orchestrator.db import views
from orchestrator.db.database import Database
from orchestrator.db.replay import News
from orchestrator.db.tailing import Place, look
from orchestrator.errors import NotFound
from orchestrator.follow import ENDED

LOOK_SECONDS = 0.04
JOB_LOOK_SECONDS = 0.25


class Tails:
    """The followers of one process: a thread for requests and one for jobs, while anybody waits."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._requests: Poller[Place, News] = Poller(
            "tails", lambda places: look(db, places), LOOK_SECONDS
        )
        self._jobs: Poller[tuple[str, str], str] = Poller(
            "job-versions", self._versions, JOB_LOOK_SECONDS
        )

    async def follow(
        self, request_id: int, seen: Mapping[int, int] | None = None
    ) -> AsyncGenerator[News, None]:
        """Every look at the request that brought something, up to the one that finds it ended.

        The first look always counts. `seen`: choice -> `token_start` of the last chunk seen of it.
        Whoever drops the iterator is looked for no more. Once the tails are closed it ends early,
        in no ended state. Raises NotFound, also when the request is removed meanwhile, and
        WorkerError when the database stays away.
        """
        place = Place(request_id, dict(seen or {}))
        while True:
            try:
                news = await self._requests.ask(place)
            except Stopped:
                return
            if news is None:  # nobody waits so long without a limit
                continue
            place = place.after(news)
            yield news
            if news.state in ENDED:
                return

    async def changed(self, job_id: str, version: str, seconds: float) -> str:
        """The job's version once it is another than `version`, or `version` after `seconds`.

        Raises NotFound and WorkerError as `follow` does; returns `version` once the tails are
        closed.
        """
        try:
            return await self._jobs.ask((job_id, version), seconds) or version
        except Stopped:
            return version

    @property
    def followed(self) -> int:
        """How many wait for news just now."""
        return self._requests.waiting + self._jobs.waiting

    @property
    def closed(self) -> bool:
        """Nobody is told of anything any more: the server is stopping."""
        return self._jobs.closed

    def close(self) -> None:
        """End every follower and both threads."""
        self._requests.close()
        self._jobs.close()

    def _versions(self, asked: Sequence[tuple[str, str]]) -> list[str | NotFound | None]:
        versions = {job_id: self._version(job_id) for job_id, _ in asked}
        return [
            None if versions[job_id] == version else versions[job_id] for job_id, version in asked
        ]

    def _version(self, job_id: str) -> str | NotFound:
        try:
            return views.version(self._db, job_id)
        except NotFound as error:
            return error
