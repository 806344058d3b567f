"""The slower parts of a job's page: why it waits, the grid of its sweep, errors by class."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from orchestrator.api.auth import Reader
from orchestrator.api.context import Ctx
from orchestrator.api.dashboard import heatmap
from orchestrator.api.dashboard.lately import Lately
from orchestrator.api.dashboard.rendering import fragment
from orchestrator.db import views

MAX_POINTS = 2000
_AT = "at."

Text = Annotated[str, Query(max_length=200)]

router = APIRouter(include_in_schema=False)


@router.get("/jobs/{job_id}/grid")
def grid(
    request: Request,
    ctx: Ctx,
    caller: Reader,
    job_id: str,
    x: Text = "",
    y: Annotated[str | None, Query(max_length=200)] = None,
    measure: Text = "",
) -> Response:
    """The measure over the parameters x and y; `at.NAME=KEY` holds another one at a value.

    What is not asked for, or does not exist, is the first that does. No `y`: one row.
    """
    job_id = views.find_job(ctx.db, job_id, owner=caller.sees)
    lately: Lately[list[views.PointTotals]] = request.app.state.lately
    points = lately.tell(job_id, lambda: views.points_page(ctx.db, job_id, limit=MAX_POINTS))
    axes = {axis.name: axis for axis in heatmap.axes(points)}
    measures = heatmap.measures(points)
    drawn = None
    fixed: dict[str, str] = {}
    if axes:
        across = axes.get(x) or _widest(axes)
        rest = [axis for axis in axes.values() if axis is not across]
        down = _down(rest, y)
        fixed = _fixed(request, [axis for axis in rest if axis is not down])
        measure = measure if measure in measures else measures[0]
        drawn = heatmap.grid(points, across, down, measure, fixed)
    values = {
        "job_id": job_id,
        "grid": drawn,
        "axes": axes,
        "measures": measures,
        "measure": measure,
        "fixed": fixed,
        "points": points,
        "all_points": views.job(ctx.db, job_id).n_points,
    }
    return fragment(request, "_grid.html", caller, values)


@router.get("/jobs/{job_id}/waiting")
def waiting(request: Request, ctx: Ctx, caller: Reader, job_id: str) -> Response:
    """Why what is queued does not run; nothing where nothing is, or the job is paused."""
    job_id = views.find_job(ctx.db, job_id, owner=caller.sees)
    status = views.job_status(ctx.db, job_id)
    asked = status.queued > 0 and status.state in ("queued", "running")
    reasons = views.waiting(ctx.db, job_id).reasons if asked else ()
    return fragment(request, "_waiting.html", caller, {"job": status, "reasons": reasons})


@router.get("/jobs/{job_id}/errors")
def errors(request: Request, ctx: Ctx, caller: Reader, job_id: str) -> Response:
    """The job's failures by class, as a part of its page."""
    job_id = views.find_job(ctx.db, job_id, owner=caller.sees)
    groups = views.errors(ctx.db, job_id)
    return fragment(request, "_errors.html", caller, {"job_id": job_id, "groups": groups})


def _widest(axes: dict[str, heatmap.Axis]) -> heatmap.Axis:
    """The first axis that is not the seed: over seeds one wants the mean, not the picture."""
    return next((axis for axis in axes.values() if axis.name != "seed"), next(iter(axes.values())))


def _down(rest: list[heatmap.Axis], y: str | None) -> heatmap.Axis | None:
    """The parameter named; the first one where nothing was said; none where nothing was named."""
    if y == "" or not rest:
        return None
    return next((axis for axis in rest if axis.name == y), rest[0])


def _fixed(request: Request, others: list[heatmap.Axis]) -> dict[str, str]:
    asked = {axis.name: request.query_params.get(_AT + axis.name, "") for axis in others}
    return {axis.name: asked[axis.name] for axis in others if asked[axis.name] in axis.keys}
