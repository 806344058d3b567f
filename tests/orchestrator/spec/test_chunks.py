"""The chunk grammar, both ways: every form of a delta, told from rows and folded again."""

from typing import Any

from orchestrator.spec.chunks import (
    ChoiceEnd,
    Envelope,
    StoredChunk,
    completion_id,
    fold,
    stream,
    usage,
)

ENVELOPE = Envelope("chatcmpl-x", 1723000000, "tiny", "fp_0123456789")
HEAD = {
    "id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1723000000, "model": "tiny",
    "system_fingerprint": "fp_0123456789",
}  # fmt: skip


def entry(token: str) -> dict[str, Any]:
    return {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}


def part(index: int, delta: Any, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return {**HEAD, "choices": [choice]}


OPENING = {"role": "assistant", "content": "", "refusal": None}


def test_a_text() -> None:
    stored = [StoredChunk(0, 0, 2, "Hi "), StoredChunk(0, 2, 1, "you")]
    found = list(stream(ENVELOPE, stored, [ChoiceEnd(0, "stop")]))
    assert found == [
        part(0, OPENING), part(0, {"content": "Hi "}), part(0, {"content": "you"}),
        part(0, {}, finish="stop"),
    ]  # fmt: skip
    assert list(found[0]) == ["id", "object", "created", "model", "system_fingerprint", "choices"]
    assert fold(found) == {
        "id": "chatcmpl-x", "object": "chat.completion", "created": 1723000000, "model": "tiny",
        "choices": [{
            "index": 0, "logprobs": None, "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Hi you", "refusal": None},
        }],
        "usage": None, "system_fingerprint": "fp_0123456789",
    }  # fmt: skip


def test_usage_tier_and_logprobs() -> None:
    envelope = Envelope("chatcmpl-x", 1723000000, "tiny", "fp_0123456789", "auto", True, True)
    stored = [StoredChunk(0, 0, 1, "Hi", [entry("Hi")])]
    counted = usage(5, 1, 3)
    found = list(stream(envelope, stored, [ChoiceEnd(0, "length")], counted))
    assert [chunk["usage"] for chunk in found] == [None, None, None, counted]
    assert all(chunk["service_tier"] == "default" for chunk in found)
    assert found[-1]["choices"] == []
    assert [chunk["choices"][0]["logprobs"] for chunk in found[:-1]] == [
        {"content": [], "refusal": None}, {"content": [entry("Hi")], "refusal": None}, None,
    ]  # fmt: skip
    folded = fold(found)
    assert folded["usage"] == counted
    assert counted["total_tokens"] == 6
    assert counted["prompt_tokens_details"]["cached_tokens"] == 3
    assert folded["service_tier"] == "default"
    assert folded["choices"][0]["logprobs"] == {"content": [entry("Hi")], "refusal": None}


def test_logprobs_only_if_asked_for() -> None:
    stored = [StoredChunk(0, 0, 1, "Hi", [entry("Hi")])]
    found = list(stream(ENVELOPE, stored, [ChoiceEnd(0, "stop")]))
    assert [chunk["choices"][0]["logprobs"] for chunk in found] == [None] * 3


def test_an_empty_text_is_empty_not_null() -> None:
    found = list(stream(ENVELOPE, [], [ChoiceEnd(0, "stop")]))
    assert found == [part(0, OPENING), part(0, {}, finish="stop")]
    assert fold(found)["choices"][0]["message"]["content"] == ""


def test_content_is_never_empty_and_no_entry_is_lost() -> None:
    envelope = Envelope("chatcmpl-x", 1, "tiny", logprobs=True)
    stored = [
        StoredChunk(0, 0, 1, "", [entry("a")]), StoredChunk(0, 1, 1, "ab", [entry("b")]),
        StoredChunk(0, 2, 1, "", [entry("c")]),
    ]  # fmt: skip
    found = list(stream(envelope, stored, [ChoiceEnd(0, "stop")]))
    assert [chunk["choices"][0]["delta"] for chunk in found] == [OPENING, {"content": "ab"}, {}]
    content = fold(found)["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in content] == ["a", "b", "c"]


def test_choices_open_in_ascending_order_and_wait_for_it() -> None:
    stored = [
        StoredChunk(2, 0, 1, "c"), StoredChunk(0, 0, 1, ""), StoredChunk(2, 1, 1, "d"),
        StoredChunk(0, 1, 1, "a"), StoredChunk(1, 0, 1, "b"), StoredChunk(0, 2, 1, "A"),
    ]  # fmt: skip
    ends = [
        ChoiceEnd(3, "stop"),
        ChoiceEnd(2, "length"),
        ChoiceEnd(0, "stop"),
        ChoiceEnd(1, "stop"),
    ]
    found = list(stream(ENVELOPE, stored, ends))
    told = [(c["choices"][0]["index"], c["choices"][0]["delta"].get("content", "-")) for c in found]
    assert told == [
        (0, ""), (0, "a"), (1, ""), (1, "b"), (2, ""), (2, "c"), (2, "d"), (0, "A"),
        (0, "-"), (1, "-"), (2, "-"), (3, ""), (3, "-"),
    ]  # fmt: skip
    folded = fold(found)
    assert [c["message"]["content"] for c in folded["choices"]] == ["aA", "b", "cd", ""]
    assert [c["finish_reason"] for c in folded["choices"]] == ["stop", "stop", "length", "stop"]


def test_what_waited_in_vain_is_told_at_the_end() -> None:
    stored = [StoredChunk(2, 0, 1, "c", None, [{"index": 0, "name": "f", "arguments": ""}])]
    folded = fold(stream(ENVELOPE, stored, [ChoiceEnd(0, "stop")]))
    assert [c["message"]["content"] for c in folded["choices"]] == ["", "", "c"]
    assert [c["finish_reason"] for c in folded["choices"]] == ["stop", None, None]
    assert folded["choices"][2]["message"]["tool_calls"][0]["function"]["name"] == "f"


def test_what_still_runs_has_no_end_and_no_usage() -> None:
    envelope = Envelope("chatcmpl-x", 1, "tiny", include_usage=True)
    found = list(stream(envelope, [StoredChunk(0, 0, 1, "a")], []))
    assert [chunk["choices"][0]["finish_reason"] for chunk in found] == [None, None]
    assert fold(found)["choices"][0]["finish_reason"] is None


def test_fold_joins_calls() -> None:
    call = {"index": 0, "id": "call_a", "type": "function",
            "function": {"name": "f", "arguments": ""}}  # fmt: skip
    other = {"index": 1, "id": "call_b", "type": "function",
             "function": {"name": "g", "arguments": "{}"}}  # fmt: skip
    deltas = [
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"ci'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'ty": 1}'}}]},
        {"tool_calls": [other]},
    ]
    found = fold([*(part(0, delta) for delta in deltas), part(0, {}, finish="tool_calls")])
    assert found["choices"][0]["message"] == {
        "role": "assistant", "content": None, "refusal": None,
        "tool_calls": [
            {"id": "call_a", "type": "function",
             "function": {"name": "f", "arguments": '{"city": 1}'}},
            {"id": "call_b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }  # fmt: skip


def test_fold_joins_a_function_call_and_a_refusal() -> None:
    deltas = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}},
        {"function_call": {"arguments": "{"}}, {"function_call": {"arguments": "}"}},
    ]  # fmt: skip
    message = fold([part(0, delta) for delta in deltas])["choices"][0]["message"]
    assert message["function_call"] == {"name": "f", "arguments": "{}"}
    chunks = [
        part(0, {"role": "assistant", "content": None, "refusal": ""}),
        part(0, {"refusal": "I'm"}, {"content": None, "refusal": [entry("I'm")]}),
    ]
    choice = fold(chunks)["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": "I'm"}
    assert choice["logprobs"] == {"content": None, "refusal": [entry("I'm")]}


def test_ids_are_functions_of_the_request() -> None:
    assert completion_id(1000000007) == "chatcmpl-yFgNB76hlwxkPkG9z8ZPdNqLerBOL"
    ids = {completion_id(number, job) for number in range(1000) for job in ("a", "b")}
    assert len(ids) == 2000
    assert all(len(each) == 38 and each[9:].isalnum() and each.isascii() for each in ids)
