"""What goes in and out of `/v1/chat/completions` and `/v1/models`, as the OpenAPI document says it.

For the document: what is refused is decided in `spec.params`, and answers are folded in
`spec.chunks`. Errors of every route are said in `orchestrator.api.errors`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Object = dict[str, Any]
Number = Annotated[float | None, Field(ge=-2, le=2)]


class ChatRequest(BaseModel):
    """The parameters of one chat; a null is as if the key were not there."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="Which model is asked; one that `GET /v1/models` lists.")
    messages: list[Object] = Field(
        min_length=1, description="The conversation so far: {role, content, ...} each."
    )
    stream: bool | None = Field(None, description="Answer in events, as the text is made.")
    stream_options: Object | None = Field(
        None, description="{include_usage}: the last chunk tells the tokens; with `stream` alone."
    )
    max_tokens: int | None = Field(None, ge=1, description="The most tokens of each choice.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Today's name of `max_tokens`; only one of the two."
    )
    n: int | None = Field(None, ge=1, le=128, description="How many choices.")
    temperature: float | None = Field(None, ge=0, le=2, description="0: the likeliest token.")
    top_p: float | None = Field(None, ge=0, le=1, description="The mass of tokens drawn from.")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The same seed, the same tokens."
    )
    stop: str | list[str] | None = Field(None, description="Up to four texts that end a choice.")
    frequency_penalty: Number = Field(None, description="For each time a token was used.")
    presence_penalty: Number = Field(None, description="Once a token was used at all.")
    logit_bias: dict[str, float] | None = Field(
        None, description="Token id -> what is added to its logit, from -100 to 100."
    )
    logprobs: bool | None = Field(None, description="Tell the log-probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="So many of the likeliest tokens too; with `logprobs`."
    )
    response_format: Object | None = Field(
        None, description="{type}: text, json_object, or json_schema with its schema."
    )
    tools: list[Object] | None = Field(
        None, min_length=1, max_length=128, description="Functions that may be called."
    )
    tool_choice: str | Object | None = Field(
        None, description="none, auto, required, or the function that has to be called."
    )
    parallel_tool_calls: bool | None = Field(None, description="More than one call at once.")
    functions: list[Object] | None = Field(
        None, min_length=1, max_length=128, description="Deprecated: `tools`."
    )
    function_call: str | Object | None = Field(None, description="Deprecated: `tool_choice`.")
    service_tier: Literal["auto", "default"] | None = Field(
        None, description="Answered with `default`."
    )
    user: str | None = Field(None, description="Whom it is for; stored, never used.")
    store: bool | None = Field(None, description="Ignored: every completion is stored.")
    metadata: dict[str, str] | None = Field(
        None, max_length=16, description="Words of your own, kept with the completion."
    )


class CompletionMessage(BaseModel):
    """What one choice says."""

    role: Literal["assistant"] = Field(description="Always `assistant`.")
    content: str | None = Field(description="The text; null where it only calls.")
    refusal: str | None = Field(description="Always null here.")
    tool_calls: list[Object] = Field([], description="Calls: {id, type, function}; or absent.")
    function_call: Object | None = Field(None, description="The deprecated form; or absent.")


class CompletionChoice(BaseModel):
    """One of the `n` answers."""

    index: int = Field(description="Its place from 0.")
    message: CompletionMessage = Field(description="What it says.")
    logprobs: Object | None = Field(description="{content, refusal}: a list of tokens; or null.")
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"] = Field(
        description="Why it ended."
    )


class CompletionUsage(BaseModel):
    """Tokens."""

    prompt_tokens: int = Field(description="Of the prompt, once.")
    completion_tokens: int = Field(description="Of all choices.")
    total_tokens: int = Field(description="Both.")
    prompt_tokens_details: Object = Field(description="{cached_tokens, audio_tokens}.")
    completion_tokens_details: Object = Field(description="Always zeros.")


class Completion(BaseModel):
    """A whole answer."""

    id: str = Field(description="`chatcmpl-` and 29 letters and digits.")
    object: Literal["chat.completion"] = Field(description="Always `chat.completion`.")
    created: int = Field(description="When it was asked, in Unix seconds.")
    model: str = Field(description="The model that answered.")
    choices: list[CompletionChoice] = Field(description="The `n` answers.")
    usage: CompletionUsage | None = Field(description="Tokens of it.")
    system_fingerprint: str | None = Field(
        description="Equal: the same weights, code and machine, and the same tokens."
    )
    service_tier: str | None = Field(None, description="`default`, where it was asked for.")
    warnings: list[str] = Field([], description="What could not be kept to; absent if nothing.")
    metadata: dict[str, str] | None = Field(None, description="As it was given; absent if not.")


class Completions(BaseModel):
    """A page of completions."""

    object: Literal["list"] = Field(description="Always `list`.")
    data: list[Completion] = Field(description="Completions that are whole.")
    first_id: str | None = Field(description="The id of the first, null if there is none.")
    last_id: str | None = Field(description="The id of the last; `after` for the next page.")
    has_more: bool = Field(description="Whether others come after these.")


class StoredMessage(BaseModel):
    """A message of the conversation that was asked, with its own further keys."""

    model_config = ConfigDict(extra="allow")

    id: str = Field(description="The completion's id and the message's place.")
    role: str = Field(description="Who said it.")
    content: str | None = Field(description="Its text; of parts, their text joined.")
    name: str | None = Field(description="The name of who said it.")
    content_parts: list[Object] | None = Field(description="The parts, where it had some.")


class StoredMessages(BaseModel):
    """A page of messages."""

    object: Literal["list"] = Field(description="Always `list`.")
    data: list[StoredMessage] = Field(description="Messages in the order of the conversation.")
    first_id: str | None = Field(description="The id of the first, null if there is none.")
    last_id: str | None = Field(description="The id of the last; `after` for the next page.")
    has_more: bool = Field(description="Whether others come after these.")


class Deleted(BaseModel):
    """What was removed."""

    id: str = Field(description="The completion's id.")
    object: Literal["chat.completion.deleted"] = Field(description="What became of it.")
    deleted: Literal[True] = Field(description="Always true.")


class Model(BaseModel):
    """A model that can be asked."""

    id: str = Field(description="Its name.")
    object: Literal["model"] = Field(default="model", description="Always `model`.")
    created: int = Field(description="Always 0: its files do not say.")
    owned_by: str = Field(description="Always `penstock`.")


class Models(BaseModel):
    """All models that can be asked."""

    object: Literal["list"] = Field(default="list", description="Always `list`.")
    data: list[Model] = Field(description="By name.")


def asked_for() -> Object:
    """The `requestBody` of a chat."""
    return {
        "required": True,
        "content": {"application/json": {"schema": ChatRequest.model_json_schema()}},
    }


_STREAM = {
    "schema": {},
    "example": 'data: {"id":"chatcmpl-...","object":"chat.completion.chunk",...}\n\n'
    "data: [DONE]\n\n",
}
Responses = dict[int | str, dict[str, Any]]
CREATED: Responses = {
    200: {
        "model": Completion,
        "content": {"text/event-stream": _STREAM},
        "description": "The completion; with `stream`, its chunks as events.",
    },
    409: {"description": "It was cancelled from elsewhere while it was answered."},
}
ONE: Responses = {200: {"model": Completion, "description": "The completion."}}
LISTED: Responses = {200: {"model": Completions, "description": "A page of completions."}}
MESSAGES: Responses = {200: {"model": StoredMessages, "description": "A page of messages."}}
DELETED: Responses = {
    200: {"model": Deleted, "description": "It is gone."},
    409: {"description": "It is still being made."},
}
