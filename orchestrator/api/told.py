"""Rows -> the status API's answers about jobs and requests.

Knows nothing of routes or of who asks: whoever calls has seen to it that they may.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import Response

from orchestrator.api.answers import (
    Answer,
    Choice,
    Chunk,
    Cost,
    JobAnswer,
    JobLine,
    Object,
    Point,
    RequestAnswer,
    RequestLine,
    Score,
    Spent,
)
from orchestrator.api.context import Context
from orchestrator.db import views
from orchestrator.db.results import ChoiceResult, Result, results_by_id
from orchestrator.db.tailing import PlacedChunk
from orchestrator.db.views import JobStatus, PointTotals, RequestStatus
from orchestrator.errors import NotFound, PenstockError
from orchestrator.spec.plan import given
from orchestrator.spec.prices import Prices
from orchestrator.spec.templates import TEMPLATED, render_tree

_USAGE = ("prompt_tokens", "cached_tokens", "completion_tokens", "replayed_tokens")


def job_line(ctx: Context, status: JobStatus) -> JobLine:
    """A job in a list."""
    return JobLine.model_validate(_job(ctx, status))


def job_answer(ctx: Context, job_id: str) -> JobAnswer:
    """Where the job stands; few queries, whatever its size. Raises NotFound."""
    found = views.standing(ctx.db, job_id)
    more = {
        "requests_per_second": _rounded(found.pace.requests_per_second),
        "tokens_per_second": _rounded(found.pace.tokens_per_second),
        "seconds_left": _rounded(found.pace.seconds_left),
        "waiting": list(found.waiting.reasons),
        "version": found.version,
    }
    return JobAnswer.model_validate(_job(ctx, found.status) | more)


def as_json(answer: Answer, headers: Mapping[str, str], status: int = 200) -> Response:
    """The answer, written by the model itself, once."""
    body = answer.model_dump_json()
    return Response(body, status, headers=dict(headers), media_type="application/json")


def point(totals: PointTotals) -> Point:
    """One cell of a sweep."""
    scores = {name: Score(mean=mean, count=n) for name, (mean, n) in totals.scores.items()}
    return Point.model_validate(asdict(totals) | {"scores": scores})


def request_answer(ctx: Context, status: RequestStatus) -> RequestAnswer:
    """One request with its choices. Raises NotFound."""
    found = results_by_id(ctx.db, [status.id])
    if not found:
        raise NotFound("request", str(status.id))
    (result,) = found
    params = _filled(result)
    more = {
        "params": {name: value for name, value in params.items() if name != "messages"},
        "messages": params.get("messages", []),
        "item": {} if result.verbatim else dict(result.columns),
        "choices": [_choice(each) for each in result.choices],
        "usage": None if result.usage is None else Spent.model_validate(result.usage),
        "scores": {
            grader: [scores.get(each.choice) for each in result.choices]
            for grader, scores in result.scores.items()
        },
        "system_fingerprint": result.system_fingerprint,
        "user": result.user,
        "warnings": list(result.warnings),
    }
    return RequestAnswer.model_validate(request_line(status).model_dump() | more)


def request_line(status: RequestStatus) -> RequestLine:
    """A request in a list."""
    return RequestLine.model_validate(status)


def chunk(stored: PlacedChunk) -> Chunk:
    """One stored chunk, its tokens as numbers."""
    ids = list(struct.unpack(f"<{len(stored.token_ids) // 4}i", stored.token_ids))
    return Chunk.model_validate(asdict(stored) | {"token_ids": ids})


def _job(ctx: Context, status: JobStatus) -> Object:
    told = asdict(status)
    told["usage"] = {name: told[name] for name in _USAGE}
    told["cost"] = _cost(ctx.prices, status)
    return told


def _cost(table: Prices, status: JobStatus) -> Cost | None:
    tokens = (status.prompt_tokens, status.cached_tokens, status.completion_tokens)
    amount = table.cost(status.model, *tokens)
    return None if amount is None else Cost(amount=amount, currency=table.currency)


def _rounded(value: float | None) -> float | None:
    """Three digits say what a pace is worth."""
    return None if value is None else float(f"{value:.3g}")


def _filled(result: Result) -> Object:
    """The request's parameters with its templates filled; as written where one cannot be."""
    params: dict[str, Any] = given(
        result.params, result.point_params, result.columns, verbatim=result.verbatim
    )
    for name in () if result.verbatim else TEMPLATED:
        if name in params:
            try:
                params[name] = render_tree(params[name], result.columns, (name,))
            except PenstockError:
                continue
    return params | {"seed": result.seed}


def _choice(result: ChoiceResult) -> Choice:
    text = "".join(stored.text for stored in result.chunks) if result.text is None else result.text
    calls: dict[int, dict[str, str]] = {}
    for stored in result.chunks:
        for piece in stored.calls or ():
            call = calls.setdefault(piece["index"], {"name": "", "arguments": ""})
            call["name"] += piece.get("name") or ""
            call["arguments"] += piece["arguments"]
    return Choice(
        choice=result.choice,
        n_tokens=result.n_tokens,
        finish_reason=result.finish_reason,  # type: ignore[arg-type]  # validated as it is made
        text=text,
        tool_calls=[calls[index] for index in sorted(calls)],
    )
