"""Laws of every stream, whatever was stored: what clients' accumulators ask for (section 3.5)."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.spec.chunks import ChoiceEnd, Envelope, StoredChunk, fold, stream, usage

N = 4
Json = dict[str, Any]
texts = st.text(alphabet="aé🎉 \n", max_size=3)


def entry(token: str) -> Json:
    return {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}


@st.composite
def stored_chunks(draw: st.DrawFn, most_calls: int) -> list[StoredChunk]:
    """Chunks as a recorder stores them: of a choice first text, then calls after one another."""
    calls = dict.fromkeys(range(N), 0)
    chunks: list[StoredChunk] = []
    for position in range(draw(st.integers(0, 14))):
        choice = draw(st.integers(0, N - 1))
        text = draw(texts) if calls[choice] == 0 else ""
        made: list[Json] = []
        for opens in draw(st.lists(st.booleans(), max_size=3)):
            if opens and calls[choice] < most_calls:
                name = draw(st.sampled_from(["f", "g"]))
                made.append({"index": calls[choice], "name": name, "arguments": ""})
                calls[choice] += 1
            elif calls[choice]:
                made.append({"index": calls[choice] - 1, "arguments": draw(texts)})
        entries = [entry(text)] if text or draw(st.booleans()) else []
        chunks.append(StoredChunk(choice, position, 1, text, entries, made or None))
    return chunks


def opened(delta: Json) -> Iterator[tuple[int, Json]]:
    """Calls that a delta opens or goes on with: index and function."""
    for call in delta.get("tool_calls", ()):
        assert ("id" in call) == ("type" in call) == ("name" in call["function"])
        yield call["index"], call["function"]
    if "function_call" in delta:
        yield 0, delta["function_call"]


def check_deltas(chunks: list[Json], n: int) -> None:
    """Roles once and ascending, call indices dense, nothing empty, nothing after the end."""
    calls: dict[int, int] = {}
    ended: set[int] = set()
    for chunk in chunks:
        (choice,) = chunk["choices"]
        index, delta = choice["index"], choice["delta"]
        assert list(choice) == ["index", "delta", "logprobs", "finish_reason"]
        assert index not in ended
        assert ("role" in delta) == (index not in calls)
        if "role" in delta:
            assert index == len(calls)
            calls[index] = 0
        assert delta.get("content") != "" or "role" in delta
        assert delta.get("content") is None or calls[index] == 0
        for place, function in opened(delta):
            calls[index] += "name" in function
            assert place == calls[index] - 1
            assert ("name" in function) == (function["arguments"] == "")
            assert choice["logprobs"] is None
        if choice["finish_reason"]:
            assert delta == {}
            ended.add(index)
    assert ended == set(range(n)) == set(calls)


@pytest.mark.parametrize("form", ["tools", "function"])
@settings(max_examples=150, deadline=None, print_blob=True)
@given(data=st.data(), include_usage=st.booleans(), logprobs=st.booleans())
def test_the_stream_keeps_the_rules_and_folds_to_what_was_stored(
    form: str, data: st.DataObject, include_usage: bool, logprobs: bool
) -> None:
    stored = data.draw(stored_chunks(3 if form == "tools" else 1))
    envelope = Envelope("chatcmpl-x", 1, "tiny", "fp_0", None, include_usage, logprobs, form)
    ends = [ChoiceEnd(choice, "stop") for choice in range(N)]

    def told() -> list[Json]:
        return list(stream(envelope, stored, ends, usage(1, len(stored))))

    found = told()
    assert json.dumps(found) == json.dumps(told())
    check_deltas(found[: len(found) - include_usage], N)
    for choice in fold(found)["choices"]:
        mine = [chunk for chunk in stored if chunk.choice == choice["index"]]
        message = choice["message"]
        assert (message["content"] or "") == "".join(chunk.text for chunk in mine)
        assert _calls_of(message) == _calls_stored(mine)
        if logprobs:
            entries = (choice["logprobs"] or {"content": []})["content"]
            assert entries == [e for chunk in mine for e in chunk.logprobs or ()]
        else:
            assert choice["logprobs"] is None


def _calls_of(message: Json) -> list[tuple[str, str]]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    functions += [message["function_call"]] if "function_call" in message else []
    return [(function["name"], function["arguments"]) for function in functions]


def _calls_stored(chunks: list[StoredChunk]) -> list[tuple[str, str]]:
    calls: dict[int, tuple[str, str]] = {}
    for call in (call for chunk in chunks for call in chunk.calls or ()):
        name, arguments = calls.get(call["index"], ("", ""))
        calls[call["index"]] = (name + call.get("name", ""), arguments + call["arguments"])
    return [calls[index] for index in sorted(calls)]


@settings(max_examples=100, deadline=None, print_blob=True)
@given(stored=stored_chunks(3), data=st.data())
def test_what_was_told_of_a_running_request_stands(
    stored: list[StoredChunk], data: st.DataObject
) -> None:
    """Chunks handed in one by one are told as soon as they can be, and never otherwise."""
    envelope = Envelope("chatcmpl-x", 1, "tiny", logprobs=True)
    ends = [ChoiceEnd(choice, "length") for choice in range(N)]
    whole = list(stream(envelope, stored, ends))
    taken = 0

    def slowly() -> Iterator[StoredChunk]:
        nonlocal taken
        for chunk in stored:
            taken += 1
            yield chunk

    told = stream(envelope, slowly(), ends)
    count = data.draw(st.integers(0, len(whole)))
    assert [next(told) for _ in range(count)] == whole[:count]
    needed = next(
        cut
        for cut in range(len(stored) + 1)
        if cut == len(stored) or len(_certain(envelope, stored[:cut])) >= count
    )
    assert taken <= needed


def _certain(envelope: Envelope, stored: list[StoredChunk]) -> list[Json]:
    """What is told of chunks while more may come: up to the first choice that said nothing."""
    said = {chunk.choice for chunk in stored if chunk.text or chunk.calls}
    first_silent = next(choice for choice in range(N + 1) if choice not in said)
    return list(stream(envelope, [c for c in stored if c.choice < first_silent], []))
