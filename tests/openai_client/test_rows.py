"""Streams of every form, made of rows by hand: OpenAI's own client folds them as we do."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest

from orchestrator.spec.chunks import ChoiceEnd, Envelope, StoredChunk, fold, stream, usage
from tests.openai_client.clients import PYTHONS, accumulated, plain

Json = dict[str, Any]
NAMES = ("newest", "1.40")


def entry(token: bytes, *top: bytes) -> Json:
    said = {"token": token.decode(errors="backslashreplace"), "logprob": -0.5, "bytes": [*token]}
    return {**said, "top_logprobs": [{**said, "bytes": [*each]} for each in top]}


def header(index: int, name: str) -> Json:
    return {"index": index, "name": name, "arguments": ""}


def rows(*said: tuple[int, str, list[Json]]) -> list[StoredChunk]:
    """(choice, text, calls): one chunk of one token each, in the order of storing."""
    starts: dict[int, int] = {}
    made: list[StoredChunk] = []
    for choice, text, calls in said:
        start = starts[choice] = starts.get(choice, -1) + 1
        made.append(StoredChunk(choice, start, 1, text, [], calls or None))
    return made


def form(
    chunks: list[StoredChunk], *reasons: str, usage: Json | None = None, **envelope: Any
) -> list[Json]:
    """A whole stream with an end for each choice."""
    head = {"system_fingerprint": "fp_0123456789", **envelope}
    ends = [ChoiceEnd(choice, reason) for choice, reason in enumerate(reasons)]
    return list(stream(Envelope("chatcmpl-x", 1723000000, "tiny", **head), chunks, ends, usage))


HALVES = [
    StoredChunk(0, 0, 2, "a", [entry(b"a", b"a", b"b")]),
    StoredChunk(0, 2, 2, "é \N{PARTY POPPER}", [entry(b"\xc3"), entry(b"\xa9 \xf0\x9f")]),
    StoredChunk(0, 4, 2, "", [entry(b"\x8e\x89")]),
]
TWO_CALLS: list[tuple[int, str, list[Json]]] = [
    (0, "", [header(0, "f"), {"index": 0, "arguments": '{"ci'}]),
    (0, "", [{"index": 0, "arguments": 'ty": "Åre"}'}, header(1, "g_2"), header(2, "f")]),
    (0, "", [{"index": 2, "arguments": "{}"}]),
]
ONE_CALL = rows((0, "", [header(0, "f")]), (0, "", [{"index": 0, "arguments": '{"a": 1}'}]))
STREAMS = {
    "text": form(rows((0, "Hi ", []), (0, "yoü\n", [])), "stop"),
    "no_text": form([], "stop"),
    "no_text_of_two": form([], "stop", "length", logprobs=True),
    "interleaved": form(
        rows((2, "c", []), (0, "a", []), (1, "b", []), (0, "A", []), (2, "C", [])),
        *("stop", "length", "stop"),
    ),
    "logprobs": form(HALVES, "stop", logprobs=True),
    "usage": form(rows((0, "Hi", [])), "length", usage=usage(5, 1, 3), include_usage=True),
    "tier_and_warnings": form(
        rows((0, "Hi", [])), "stop", service_tier="auto", warnings=("a", "b")
    ),
    "one_call": form(ONE_CALL, "stop", usage=usage(9, 2), include_usage=True),
    "parallel_calls": form(rows(*TWO_CALLS), "tool_calls", logprobs=True),
    "text_then_calls": form(rows((0, "Let me see.", []), *TWO_CALLS), "tool_calls"),
    "text_and_call_at_once": form(rows((0, "So: ", [header(0, "f")])), "tool_calls"),
    "length_inside_a_call": form(rows(*TWO_CALLS[:1]), "length"),
    "function_call": form(ONE_CALL, "function_call", calls="function"),
    "text_then_function_call": form(
        [*rows((0, "Hm", [])), *ONE_CALL], "function_call", calls="function"
    ),
    "calls_and_texts_interleaved": form(
        rows((1, "", TWO_CALLS[0][2]), (2, "b", []), (0, "a", []), (2, "", [header(0, "f")])),
        *("stop", "length", "tool_calls"),
    ),
}


@pytest.fixture(scope="module", params=NAMES)
def clients(request: pytest.FixtureRequest) -> Iterator[dict[str, Json]]:
    yield accumulated(request.param, STREAMS)


@pytest.mark.parametrize("name", STREAMS)
def test_the_client_folds_it_as_we_do(clients: dict[str, Json], name: str) -> None:
    ours, theirs = fold(STREAMS[name]), clients[name]
    assert plain(theirs["completion"]) == ours
    if any(choice["finish_reason"] == "length" for choice in ours["choices"]):
        assert theirs["final"] is None
    else:
        assert plain(theirs["final"]) == ours


@pytest.mark.parametrize("name", ["parallel_calls", "text_then_calls"])
def test_each_call_is_done_once(clients: dict[str, Json], name: str) -> None:
    events = clients[name]["events"]
    assert events.count("tool_calls.function.arguments.done") == 3
    assert events.count("content.done") == (name == "text_then_calls")


def test_the_versions_are_what_they_are_called() -> None:
    said = [
        subprocess.run(
            [PYTHONS[name], "-c", "import openai; print(openai.__version__)"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in NAMES
    ]
    assert said[1].startswith("1.40.")
    assert said[0] != said[1]


def test_the_forms_are_those_of_the_reference() -> None:
    """So that no form goes missing: every kind of delta and of finish is in the table above."""
    parts = [choice for chunk in chain(*STREAMS.values()) for choice in chunk["choices"]]
    kinds = {(*part["delta"],) for part in parts}
    assert kinds == {
        ("role", "content", "refusal"),
        ("content",),
        ("role", "content", "tool_calls", "refusal"),
        ("tool_calls",),
        ("role", "content", "function_call"),
        ("function_call",),
        (),
    }
    reasons = {part["finish_reason"] for part in parts}
    assert reasons == {None, "stop", "length", "tool_calls", "function_call"}
    json.dumps(STREAMS, allow_nan=False)
    assert PYTHONS["newest"].samefile(sys.executable)
