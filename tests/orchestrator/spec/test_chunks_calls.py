"""Calls in the chunk grammar: each first delta of the reference's section 3.2, word for word."""

from typing import Any

from orchestrator.spec.chunks import ChoiceEnd, Envelope, StoredChunk, call_id, fold, stream

TOOLS = Envelope("chatcmpl-x", 1723000000, "tiny", "fp_0123456789", logprobs=True)
FUNCTIONS = Envelope("chatcmpl-x", 1723000000, "tiny", "fp_0123456789", calls="function")


def header(index: int, name: str, arguments: str = "") -> dict[str, Any]:
    return {"index": index, "name": name, "arguments": arguments}


def fragment(index: int, arguments: str) -> dict[str, Any]:
    return {"index": index, "arguments": arguments}


def chunk(text: str, *calls: dict[str, Any], choice: int = 0, start: int = 0) -> StoredChunk:
    return StoredChunk(choice, start, 1, text, [], list(calls) or None)


def told(envelope: Envelope, *chunks: StoredChunk, finish: str = "tool_calls") -> list[Any]:
    """(delta, logprobs, finish_reason) of each chunk of a stream of one choice."""
    found = stream(envelope, chunks, [ChoiceEnd(0, finish)])
    parts = [each["choices"][0] for each in found]
    return [(part["delta"], part["logprobs"], part["finish_reason"]) for part in parts]


def opened(index: int, name: str) -> dict[str, Any]:
    """A call's header as clients see it."""
    id = call_id("chatcmpl-x", 0, index)
    function = {"name": name, "arguments": ""}
    return {"index": index, "id": id, "type": "function", "function": function}


def test_calls_after_one_another_without_text() -> None:
    first = {"role": "assistant", "content": None, "tool_calls": [opened(0, "f")], "refusal": None}
    found = told(
        TOOLS,
        chunk(""),
        chunk("", header(0, "f"), fragment(0, '{"ci')),
        chunk("", fragment(0, 'ty": 1}'), header(1, "g"), fragment(1, "{}"), start=1),
    )
    assert found == [
        (first, None, None),
        ({"tool_calls": [{"index": 0, "function": {"arguments": '{"ci'}}]}, None, None),
        ({"tool_calls": [{"index": 0, "function": {"arguments": 'ty": 1}'}}]}, None, None),
        ({"tool_calls": [opened(1, "g")]}, None, None),
        ({"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]}, None, None),
        ({}, None, "tool_calls"),
    ]
    assert list(found[0][0]) == ["role", "content", "tool_calls", "refusal"]
    assert "name" not in found[1][0]["tool_calls"][0]["function"]


def test_text_before_a_call_opens_the_choice() -> None:
    entry = {"token": "Let", "logprob": -1.0, "bytes": [76, 101, 116], "top_logprobs": []}
    reported = {"content": [entry], "refusal": None}
    stored = StoredChunk(0, 0, 2, "Let", [entry], [header(0, "f"), fragment(0, "{}")])
    assert told(TOOLS, stored) == [
        (
            {"role": "assistant", "content": "", "refusal": None},
            {"content": [], "refusal": None},
            None,
        ),
        ({"content": "Let"}, reported, None),
        ({"tool_calls": [opened(0, "f")]}, None, None),
        ({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}, None, None),
        ({}, None, "tool_calls"),
    ]


def test_the_deprecated_call() -> None:
    stored = chunk("", header(0, "f"), fragment(0, "{"))
    first = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}
    found = told(FUNCTIONS, stored, chunk("", fragment(0, "}"), start=1), finish="function_call")
    assert found == [
        (first, None, None),
        ({"function_call": {"arguments": "{"}}, None, None),
        ({"function_call": {"arguments": "}"}}, None, None),
        ({}, None, "function_call"),
    ]
    after_text = told(FUNCTIONS, chunk("Hi", header(0, "f")), finish="function_call")
    assert [delta for delta, _, _ in after_text] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hi"},
        {"function_call": {"name": "f", "arguments": ""}},
        {},
    ]


def test_a_call_folds_to_a_message_without_content() -> None:
    chunks = [chunk("", header(0, "f", '{"a":'), header(1, "g")), chunk("", fragment(1, " "))]
    (choice,) = fold(stream(TOOLS, chunks, [ChoiceEnd(0, "length")]))["choices"]
    calls = [opened(0, "f"), opened(1, "g")]
    calls[0]["function"]["arguments"], calls[1]["function"]["arguments"] = '{"a":', " "
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [{k: call[k] for k in ("id", "type", "function")} for call in calls],
        },
        "logprobs": None,
        "finish_reason": "length",
    }


def test_each_choice_opens_as_it_begins_and_has_ids_of_its_own() -> None:
    stored = [chunk("", header(0, "f"), choice=1), chunk("Hi", header(0, "f"), choice=0)]
    found = list(stream(TOOLS, stored, []))
    parts = [each["choices"][0] for each in found]
    assert [part["index"] for part in parts] == [0, 0, 0, 1]
    assert [part["delta"].get("role") for part in parts] == ["assistant", None, None, "assistant"]
    ids = [part["delta"]["tool_calls"][0]["id"] for part in parts[2:]]
    assert ids == [call_id("chatcmpl-x", 0, 0), call_id("chatcmpl-x", 1, 0)]


def test_ids_of_calls_are_functions_of_their_place() -> None:
    assert call_id("chatcmpl-x", 0, 0) == "call_2cDnVz11qUnb4BVq6sYCJUR3"
    places = [(id, choice, index) for id in "ab" for choice in range(20) for index in range(20)]
    ids = {call_id(*place) for place in places}
    assert len(ids) == len(places)
    assert all(len(id) == 29 and id[5:].isalnum() and id.isascii() for id in ids)


def test_warnings_are_in_every_chunk_and_the_completion_and_absent_without() -> None:
    warned = Envelope("chatcmpl-x", 1, "tiny", include_usage=True, warnings=("no format",))
    found = list(stream(warned, [chunk("a")], [ChoiceEnd(0, "stop")], {"prompt_tokens": 1}))
    assert [each["warnings"] for each in found] == [["no format"]] * 4
    assert fold(found)["warnings"] == ["no format"]
    plain = list(stream(TOOLS, [chunk("a")], [ChoiceEnd(0, "stop")]))
    assert not any("warnings" in each for each in [*plain, fold(plain)])
