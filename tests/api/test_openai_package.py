"""OpenAI's own Python client against the whole service: what its users write, word for word."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from orchestrator.spec.chunks import fold
from tests.api.chatting import (
    ASK,
    Service,
    endless,
    newest,
    same,
    serving,
    slowed,
    tiny,
    until,
)
from workers.process import LoadedModel

Json = dict[str, Any]
TEXT = "31 + 44 = 75"


class Weather(BaseModel):
    """What a forecast says."""

    city: Literal["Oslo", "Rome"]
    days: Literal[1, 2]


class GetWeather(BaseModel):
    """The forecast for a city."""

    city: Literal["Oslo", "Rome"]


TOOLS = [openai.pydantic_function_tool(GetWeather, name="get_weather")]
ASKED: Json = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny()


@pytest.fixture(scope="module")
def service(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    file = tmp_path_factory.mktemp("package") / "penstock.db"
    with serving(f"sqlite:///{file}", model=model) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=service.v1, api_key="none", timeout=60) as opened:
        yield opened


def test_a_whole_completion(client: OpenAI) -> None:
    completion = client.chat.completions.create(**ASKED)
    assert completion.choices[0].message.content == TEXT
    assert completion.usage is not None
    assert completion.usage.total_tokens > completion.usage.completion_tokens > 0


def test_a_stream(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(**ASKED, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1


def test_a_stream_folds_to_the_whole_in_their_hands_and_in_ours(client: OpenAI) -> None:
    params: Json = {**ASKED, "temperature": 1.5, "seed": 7, "n": 3, "logprobs": True}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [
        each.to_dict(mode="json") for each in client.chat.completions.create(**params, **options)
    ]
    whole = client.chat.completions.create(**params).to_dict(mode="json")
    assert same(fold(chunks)) == same(whole)


def test_the_helper_for_streams(client: OpenAI) -> None:
    with client.chat.completions.stream(**ASKED, stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
    final = stream.get_final_completion()
    assert kinds[0] == "chunk" and "content.delta" in kinds and "content.done" in kinds
    assert final.choices[0].message.content == TEXT
    assert final.usage is not None and final.usage.completion_tokens > 0


def test_structured_output(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(**{**ASKED, "max_tokens": 80}, response_format=Weather)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(
        **{**ASKED, "max_tokens": 80}, response_format=Weather
    ) as stream:
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.parsed == parsed.choices[0].message.parsed


def test_tools(client: OpenAI) -> None:
    params: Json = {
        **ASKED,
        "max_tokens": 120,
        "tools": TOOLS,
        "tool_choice": "required",
        "seed": 1,
    }
    parsed = client.chat.completions.parse(**params)
    message = parsed.choices[0].message
    assert parsed.choices[0].finish_reason == "tool_calls" and message.tool_calls
    call = message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert isinstance(call.function.parsed_arguments, GetWeather)
    with client.chat.completions.stream(**params) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    told = final.choices[0].message.tool_calls
    assert told and told[0].function.arguments == call.function.arguments
    answered = [
        *ASK,
        {"role": "assistant", "tool_calls": [call.to_dict(mode="json")]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    for each in answered[1]["tool_calls"]:  # type: ignore[union-attr]
        each["function"].pop("parsed_arguments", None)
    client.chat.completions.create(**{**ASKED, "messages": answered, "tools": TOOLS})


def test_models(client: OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_errors_are_its_typed_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**{**ASKED, "temperature": 9})
    assert (bad.value.param, bad.value.code) == ("temperature", "decimal_above_max_value")
    assert bad.value.type == "invalid_request_error"
    assert bad.value.request_id is not None and bad.value.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**{**ASKED, "model": "gpt-9"})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            **{**ASKED, "messages": [{"role": "user", "content": "word " * 2000}]}
        )
    assert (long.value.param, long.value.code) == ("messages", "context_length_exceeded")


def test_headers(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**ASKED)
    assert raw.request_id is not None and raw.request_id.startswith("req_")
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.headers["openai-version"] == "2020-10-01"


def test_a_stream_that_is_closed_cancels(
    service: Service, client: OpenAI, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(model, 0.01, monkeypatch)
    stream = client.chat.completions.create(**endless(), stream=True)
    next(iter(stream))
    assert newest(service.db)["state"] == "running"
    stream.close()
    until(lambda: newest(service.db)["state"] == "cancelled")


def test_a_time_limit_cancels_and_is_tried_no_more(
    service: Service, client: OpenAI, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(model, 0.01, monkeypatch)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5, max_retries=0).chat.completions.create(**endless())
    until(lambda: newest(service.db)["state"] == "cancelled")


def test_stored_completions(client: OpenAI) -> None:
    made = client.chat.completions.create(**ASKED, store=True)
    assert client.chat.completions.retrieve(made.id) == made
    newest_first = client.chat.completions.list(model="tiny", limit=1, order="desc")
    assert newest_first.data[0].id == made.id
    ids = [each.id for each in client.chat.completions.list(limit=2)]
    assert made.id in ids and len(ids) == len(set(ids)) > 2
    messages = client.chat.completions.messages.list(made.id)
    assert [each.content for each in messages] == [ASK[0]["content"]]
    assert client.chat.completions.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(made.id)


def test_many_at_once_asynchronously(service: Service) -> None:
    """Twelve streams and twelve whole answers on four slots, all those of their seeds."""

    def params(seed: int) -> Json:
        return endless(temperature=1.5, seed=seed, n=2, max_tokens=30)

    async def streamed(client: AsyncOpenAI, seed: int) -> Json:
        options = {"include_usage": True}
        stream = await client.chat.completions.create(
            **params(seed), stream=True, stream_options=options
        )
        return same(fold([each.to_dict(mode="json") async for each in stream]))

    async def whole(client: AsyncOpenAI, seed: int) -> Json:
        completion = await client.chat.completions.create(**params(seed))
        return same(completion.to_dict(mode="json"))

    async def both() -> tuple[list[Json], list[Json]]:
        async with AsyncOpenAI(base_url=service.v1, api_key="none", timeout=120) as client:
            asked = [streamed(client, seed) for seed in range(12)]
            asked += [whole(client, seed) for seed in range(12)]
            found = await asyncio.gather(*asked)
        return found[:12], found[12:]

    streams, answers = asyncio.run(both())
    assert streams == answers
    assert len({json.dumps(each["choices"]) for each in streams}) > 6
