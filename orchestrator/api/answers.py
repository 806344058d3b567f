"""What the status API answers, as the OpenAPI document says it: every field described.

Knows nothing of routes, nor of how rows become these. Times are UTC, durations seconds.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Object = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]
JobState = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled", "partial"]
JobKind = Literal["job", "batch", "chat"]
RequestState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FinishReason = Literal["stop", "length", "tool_calls", "function_call"]
Each = TypeVar("Each")


class Answer(BaseModel):
    """The base of all answers: read from rows, never changed."""

    model_config = ConfigDict(frozen=True, from_attributes=True)


class Page(Answer, Generic[Each]):
    """A page of a list."""

    data: list[Each] = Field(description="What is on this page.")
    next: int | None = Field(
        description="`after` for the next page; null when this one is the last."
    )


class All(Answer, Generic[Each]):
    """A whole list."""

    data: list[Each] = Field(description="All of them.")


class Cost(Answer):
    """What the tokens cost by the table of prices."""

    amount: float = Field(description="In units of the currency.")
    currency: str = Field(description="Its code in ISO 4217.")


class Spent(Answer):
    """Tokens of a job or of a request, over all attempts."""

    prompt_tokens: int = Field(description="Of prompts, once a request.")
    cached_tokens: int = Field(description="Those of them that were not computed anew.")
    completion_tokens: int = Field(description="Generated, of all choices.")
    replayed_tokens: int = Field(description="Computed a second time after an interruption.")


class JobLine(Answer):
    """A job in a list."""

    id: str = Field(description="Its id, `job_...`.")
    number: int = Field(description="Rises with each job; the cursor of the list.")
    name: str = Field(description="Its name, as its file says.")
    model: str = Field(description="The model that it asks.")
    kind: JobKind = Field(description="`job` from a file; `batch` or `chat` from `/v1`.")
    owner: str = Field(description="Whose it is; empty for the machine's own.")
    state: JobState = Field(
        description="`partial`: it has ended, some requests succeeded and some did not."
    )
    requests: int = Field(description="How many requests it has.")
    queued: int = Field(description="Those that wait.")
    running: int = Field(description="Those that a worker holds.")
    succeeded: int = Field(description="Those that have all their choices.")
    failed: int = Field(description="Those that cannot succeed.")
    cancelled: int = Field(description="Those that were cancelled before their end.")
    usage: Spent = Field(description="Its tokens so far.")
    cost: Cost | None = Field(description="Null where the model has no price.")
    created_at: datetime = Field(description="When it was submitted.")
    started_at: datetime | None = Field(description="When a worker first claimed of it.")
    finished_at: datetime | None = Field(description="When its last request ended.")
    deadline_at: datetime | None = Field(description="When what is left of it is cancelled.")
    cancel_reason: str | None = Field(description="Why it was cancelled.")


class JobAnswer(JobLine):
    """Where one job stands."""

    requests_per_second: float | None = Field(description="Ended, over about the last minute.")
    tokens_per_second: float | None = Field(description="Generated, over the same time.")
    seconds_left: float | None = Field(description="At that pace; null where it is not known.")
    waiting: list[str] = Field(description="Why its queued requests do not run now, in words.")
    version: str = Field(description="Another one whenever the state, counts or tokens are others.")


class Planned(Answer):
    """What a job would run."""

    name: str = Field(description="Its name.")
    model: str = Field(description="The model that it asks.")
    n_items: int = Field(description="Rows of its dataset.")
    n_points: int = Field(description="Cells of its sweep.")
    n_requests: int = Field(description="Items at points.")
    n_choices: int = Field(description="Completions.")
    max_total_tokens: int | None = Field(
        description="The most completion tokens; null where nothing bounds them."
    )
    points: list[Object] = Field(description="{position, params} of each point.")
    examples: list[Object] = Field(description="{custom_id, messages} of the first items.")


class Retried(Answer):
    """What was queued again."""

    retried: int = Field(description="How many requests.")
    job: JobAnswer = Field(description="The job afterwards.")


class Reason(BaseModel):
    """Why a job is cancelled."""

    model_config = ConfigDict(extra="forbid")

    reason: str | None = Field(None, max_length=1000, description="For those who look later.")


class Score(Answer):
    """What one grader says of a point's choices."""

    mean: float | None = Field(description="The mean over what is scored.")
    count: int = Field(description="How many choices are scored.")


class Point(Answer):
    """One cell of a job's sweep and how it fares."""

    position: int = Field(description="Its place in the sweep, from 0; the cursor of the list.")
    params: Object = Field(description="The parameters that it sets.")
    requests: int = Field(description="Its requests.")
    queued: int = Field(description="Those that wait.")
    running: int = Field(description="Those that a worker holds.")
    succeeded: int = Field(description="Those that have all their choices.")
    failed: int = Field(description="Those that cannot succeed.")
    cancelled: int = Field(description="Those that were cancelled before their end.")
    prompt_tokens: int = Field(description="Of prompts, once a request.")
    completion_tokens: int = Field(description="Generated, of all choices.")
    replayed_tokens: int = Field(description="Computed a second time after an interruption.")
    mean_tokens: float | None = Field(description="Generated a choice, of those that have ended.")
    scores: dict[str, Score] = Field(description="By grader.")


class RequestLine(Answer):
    """A request in a list."""

    id: int = Field(description="Its id; the cursor of the list.")
    job_id: str = Field(description="The job it belongs to.")
    state: RequestState = Field(description="Where it stands.")
    custom_id: str = Field(description="What its item is called.")
    item_position: int = Field(description="The item's place in the dataset, from 0.")
    point_position: int = Field(description="The point's place in the sweep, from 0.")
    seed: int = Field(description="The seed of its first choice.")
    n: int = Field(description="How many choices it has.")
    n_tokens: int = Field(description="Tokens so far, of all choices.")
    attempt: int = Field(description="How often a worker has claimed it.")
    worker_id: str | None = Field(description="Who holds it, or did last.")
    error_code: str | None = Field(description="What went wrong, in its last attempt.")
    error_message: str | None = Field(description="The same in words.")
    created_at: datetime = Field(description="When it was planned.")
    started_at: datetime | None = Field(description="When it was first claimed.")
    finished_at: datetime | None = Field(description="When it ended.")
    retry_at: datetime | None = Field(description="Until when it waits for another attempt.")


class Choice(Answer):
    """One completion of a request."""

    choice: int = Field(description="Its place from 0.")
    n_tokens: int = Field(description="Its tokens so far.")
    finish_reason: FinishReason | None = Field(description="Why it ended; null while it runs.")
    text: str = Field(description="Its text so far.")
    tool_calls: list[Object] = Field(description="Calls so far: {name, arguments} each.")


class RequestAnswer(RequestLine):
    """One request: what is asked, and what has come of it."""

    params: Object = Field(description="Its parameters, templates filled.")
    messages: list[Object] = Field(description="The conversation, templates filled.")
    item: Object = Field(description="The columns of its item; empty where they are the params.")
    choices: list[Choice] = Field(description="Its completions, in order.")
    usage: Spent | None = Field(description="Null before the first flush.")
    scores: dict[str, list[float | None]] = Field(
        description="Grader -> a score per choice, null where there is none."
    )
    system_fingerprint: str | None = Field(
        description="Equal: the same weights, code and machine, and the same tokens."
    )
    user: str | None = Field(description="The parameter `user`.")
    warnings: list[str] = Field(description="What of it could not be kept to.")


class Chunk(Answer):
    """What one flush stored of one choice."""

    position: int = Field(description="Rises in the order of storing, with gaps; the cursor.")
    choice: int = Field(description="Which of the choices.")
    token_start: int = Field(description="How many tokens of the choice come before.")
    n_tokens: int = Field(description="How many tokens it has.")
    token_ids: list[int] = Field(description="The tokens, by the model's own numbers.")
    text: str = Field(description="What of the text has become safe to show.")
    logprobs: list[Object] | None = Field(description="An entry a token, where asked for.")
    calls: list[Object] | None = Field(description="Pieces of calls, after the text.")
    created_at: datetime = Field(description="When it was stored.")


class ErrorLine(Answer):
    """A class of errors in a job."""

    code: str = Field(description="Their code.")
    count: int = Field(description="How many requests have it.")
    message: str | None = Field(description="The message of one of them.")
    request_id: int = Field(description="That one.")


class EventLine(Answer):
    """What happened to a job."""

    id: int = Field(description="Rises with time; the cursor of the list.")
    at: datetime = Field(description="When.")
    event: str = Field(description="`submitted`, `started`, `paused`, ..., `ended`.")
    detail: str | None = Field(description="More of it: a reason, a count, a state.")


class WorkerLine(Answer):
    """One worker that has not left."""

    id: str = Field(description="Its id.")
    hostname: str = Field(description="The machine it runs on.")
    pid: int = Field(description="Its process there.")
    model: str = Field(description="The model that it serves.")
    device: str = Field(description="What it computes on.")
    slots: int = Field(description="How many choices it generates at once.")
    started_at: datetime = Field(description="When it began.")
    seen_at: datetime = Field(description="When it was last heard of.")
    alive: bool = Field(description="It was heard of within the last minute.")
    slots_used: int | None = Field(description="Slots in use, as it last said.")
    tokens_per_second: float | None = Field(description="Its speed, as it last said.")
    memory_bytes: int | None = Field(description="Of its model and slots, as it last said.")


class ModelLine(Answer):
    """A model that can be asked."""

    name: str = Field(description="Its name.")
    at_hand: bool = Field(description="Its files are here: jobs are checked against them.")
    workers: int = Field(description="How many live workers serve it.")
    slots: int = Field(description="How many choices they generate at once, together.")


class QueueLine(Answer):
    """What one model has to do, of all owners."""

    model: str = Field(description="The model.")
    queued: int = Field(description="Requests that wait, of jobs that are neither held nor over.")
    running: int = Field(description="Requests that workers hold.")
    oldest_waiting_seconds: float | None = Field(
        description="Since the oldest of those jobs was submitted; null when nothing waits."
    )


class Schedule(Answer):
    """A job that is submitted again and again; there are none yet."""

    name: str = Field(description="Its name.")


CONFLICT: Responses = {
    409: {"description": "Its state does not allow that, or several ids begin so."}
}
UNKNOWN_TYPE: Responses = {
    415: {"description": "The body is neither YAML nor JSON (`unsupported_media_type`)."}
}
