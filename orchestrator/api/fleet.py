"""`/api/workers`, `/api/models`, `/api/queues`, `/api/schedules`: what there is to work with.

Knows nothing of single jobs: these are told to whoever may read.
"""

from __future__ import annotations

from fastapi import APIRouter, Depends

from orchestrator.api.answers import All, ModelLine, QueueLine, Schedule, WorkerLine
from orchestrator.api.auth import Reader
from orchestrator.api.context import Ctx
from orchestrator.api.queries import only_known
from orchestrator.db import views

router = APIRouter(prefix="/api", tags=["fleet"], dependencies=[Depends(only_known)])


@router.get("/workers", summary="The workers")
def list_workers(caller: Reader, ctx: Ctx) -> All[WorkerLine]:
    """Those that have not left, the oldest first, and what each last said of itself."""
    return All(data=[WorkerLine.model_validate(worker) for worker in views.workers(ctx.db)])


@router.get("/models", summary="The models")
def list_models(caller: Reader, ctx: Ctx) -> All[ModelLine]:
    """Models whose files are here, and those that live workers serve, by name."""
    live = views.live_workers(ctx.db)
    names = sorted({*ctx.models, *(worker.model for worker in live)})
    slots = {name: [each.slots for each in live if each.model == name] for name in names}
    return All(
        data=[
            ModelLine(
                name=name,
                at_hand=name in ctx.models,
                workers=len(slots[name]),
                slots=sum(slots[name]),
            )
            for name in names
        ]
    )


@router.get("/queues", summary="What waits and runs, by model")
def list_queues(caller: Reader, ctx: Ctx) -> All[QueueLine]:
    """Counts alone, over the jobs of all owners."""
    depths = views.queue_depths(ctx.db)
    return All(data=[QueueLine.model_validate(depths[model]) for model in sorted(depths)])


@router.get("/schedules", summary="The schedules")
def list_schedules(caller: Reader, ctx: Ctx) -> All[Schedule]:
    """Empty: jobs cannot be scheduled yet."""
    return All(data=[])
