"""`/v1/models`: the models that are at hand here or that a live worker serves."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from orchestrator.api.auth import Reader
from orchestrator.api.context import Context, Ctx
from orchestrator.api.errors import ApiError
from orchestrator.api.openai.shapes import Model, Models
from orchestrator.db import views

ModelName = Annotated[str, Path(description="The model's name.")]
router = APIRouter(prefix="/v1/models", tags=["OpenAI: models"])


@router.get("", summary="The models that can be asked")
def list_models(caller: Reader, ctx: Ctx) -> Models:
    """Models at hand and models of live workers, by name."""
    return Models(data=[_model(name) for name in served(ctx)])


@router.get("/{model:path}", summary="One model")
def get_model(model: ModelName, caller: Reader, ctx: Ctx) -> Model:
    """The model of this name, if it can be asked."""
    refuse_unknown(ctx, model)
    return _model(model)


def served(ctx: Context) -> list[str]:
    """Names of the models at hand here and of those that live workers have, in order."""
    return sorted({*ctx.models, *(worker.model for worker in views.live_workers(ctx.db))})


def refuse_unknown(ctx: Context, model: str) -> None:
    """Raises ApiError, 404 with `model_not_found`, for a model that nobody has."""
    if model in ctx.models or model in served(ctx):
        return
    text = f"The model `{model}` does not exist or you do not have access to it."
    raise ApiError(404, text, code="model_not_found")


def _model(name: str) -> Model:
    return Model(id=name, created=0, owned_by="penstock")
