"""Byte-exact text from any tokens: laws over random ids, against one-shot decoding."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizers_by_hand import KINDS, all_bytes, ids_of_bytes
from workers.words.text import Emitted, LogprobEntry, TextStream
from workers.words.tokenizer import Tokenizer, logprob_entry


def run(
    stream: TextStream, ids: list[int], entries: list[LogprobEntry] | None = None
) -> list[Emitted]:
    """Every release up to the stop string or the end."""
    released = []
    for at, id in enumerate(ids):
        released.append(stream.push(id, entries[at] if entries else None))
        if released[-1].stopped:
            return released
    return [*released, stream.finish()]


def cut_at_first_stop(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...]) -> str:
    """The law of stop strings, by decoding everything anew after every token."""
    for n in range(len(ids) + 1):
        data = all_bytes(tokenizer, ids[:n])
        text = data.decode("utf-8", "replace")
        if n < len(ids) and is_dangling(data):
            text = text[:-1]
        starts = [text.find(stop) for stop in stops if stop in text]
        if starts:
            return text[: min(starts)]
    return text


def is_dangling(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        tail = data[error.start :]
        if error.reason == "unexpected end of data":
            return True
        return is_dangling(tail[error.end - error.start :])
    return False


# --- the stream's laws, over random tokens


def some_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Random ids, half of them single bytes of emoji, so that characters are cut in all ways."""
    raw = "\U0001f680é\u65e5ab \xff".encode() + b"\xff\xc3\xf0\x9f"
    single = [
        id
        for id in range(tokenizer.vocab_size)
        if len(data := tokenizer.token_bytes(id)) == 1 and data in raw
    ]
    anything = st.integers(0, tokenizer.vocab_size - 1)
    return st.lists(st.sampled_from(single) | anything, max_size=30)


STOPS = st.lists(
    st.text("ab\ufffdé\U0001f680 o", min_size=1, max_size=4) | st.sampled_from(["Hello", "aab"]),
    max_size=4,
).map(tuple)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["byte_level", "gemma"]), stops=STOPS)
def test_the_emitted_text_is_the_whole_decoding_cut_at_the_stop(
    by_kind: dict[str, Tokenizer], data: st.DataObject, kind: str, stops: tuple[str, ...]
) -> None:
    tokenizer = by_kind[kind]
    ids = data.draw(some_ids(tokenizer))
    expected = cut_at_first_stop(tokenizer, ids, stops)
    stream = TextStream(tokenizer, stops)
    emitted = ""
    for released in run(stream, ids):
        emitted += released.text
        assert expected.startswith(emitted), "a part of a stop string or character was emitted"
    assert stream.text == emitted == expected
    assert not any(stop in emitted for stop in stops)
    whole = all_bytes(tokenizer, ids).decode("utf-8", "replace")
    if not stops:
        assert emitted == whole == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from(list(KINDS)), stops=STOPS)
def test_a_replayed_stream_goes_on_alike(
    by_kind: dict[str, Tokenizer], data: st.DataObject, kind: str, stops: tuple[str, ...]
) -> None:
    tokenizer = by_kind[kind]
    ids = data.draw(some_ids(tokenizer))
    entries = [logprob_entry(tokenizer, id, -0.5, [(id, -0.5)]) for id in ids]
    golden = run(TextStream(tokenizer, stops), ids, entries)
    for at in range(min(len(ids), len(golden))):
        stream = TextStream(tokenizer, stops)
        replayed = [stream.push(*pair) for pair in zip(ids[:at], entries[:at], strict=True)]
        assert replayed + run(stream, ids[at:], entries[at:]) == golden


@settings(max_examples=400, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["byte_level", "gemma"]), stops=STOPS)
def test_an_entry_travels_with_the_last_byte_of_its_token(
    by_kind: dict[str, Tokenizer], data: st.DataObject, kind: str, stops: tuple[str, ...]
) -> None:
    tokenizer = by_kind[kind]
    ids = [id for id in data.draw(some_ids(tokenizer)) if tokenizer.token_bytes(id)]
    entries = [logprob_entry(tokenizer, id, -float(at), []) for at, id in enumerate(ids)]
    released = run(TextStream(tokenizer, stops), ids, entries)
    text = "".join(each.text for each in released)

    def character(n_bytes: int) -> int:  # the one that holds the last of so many bytes
        return len(all_bytes(tokenizer, ids)[:n_bytes].decode("utf-8", "replace")) - 1

    size, expected = 0, []
    for id in ids:
        first, last = character(size + 1), character(size + len(tokenizer.token_bytes(id)))
        size += len(tokenizer.token_bytes(id))
        expected.append((first, last))
    reported = [at for at, (first, _) in enumerate(expected) if first < len(text)]
    got = [-int(entry["logprob"]) for each in released for entry in each.logprobs]
    assert got == reported, "one entry for each token with text before the cut, in order"
    emitted = 0
    for each in released:
        before, emitted = emitted, emitted + len(each.text)
        for entry in each.logprobs:
            last = expected[-int(entry["logprob"])][1]
            assert before <= last < emitted or (each.stopped and last >= emitted)
    straddles = any(first < len(text) <= last for first, last in expected)
    if not straddles and "\ufffd" not in text:
        joined = bytes(byte for each in released for e in each.logprobs for byte in e["bytes"])
        assert joined == text.encode()


# --- by example


def test_an_emoji_is_held_until_it_is_whole(bpe: Tokenizer) -> None:
    ids = ids_of_bytes(bpe, "a\U0001f680b".encode())
    entries = [logprob_entry(bpe, id, -1.0, []) for id in ids]
    released = run(TextStream(bpe), ids, entries)
    assert [each.text for each in released] == ["a", "", "", "", "\U0001f680", "b", ""]
    assert [len(each.logprobs) for each in released] == [1, 0, 0, 0, 4, 1, 0]
    assert released[4].logprobs[0]["token"] == "\\xf0"
    assert [entry["bytes"] for entry in released[4].logprobs] == [[240], [159], [154], [128]]


def test_a_dangling_sequence_is_one_replacement(bpe: Tokenizer) -> None:
    released = run(TextStream(bpe), ids_of_bytes(bpe, b"a\xf0\x9f\x92"))
    assert [each.text for each in released] == ["a", "", "", "", "\ufffd"]


def test_a_broken_sequence_is_one_replacement_and_the_rest(bpe: Tokenizer) -> None:
    released = run(TextStream(bpe), ids_of_bytes(bpe, b"\xf0\x9fA"))
    assert [each.text for each in released] == ["", "", "\ufffdA", ""]


def test_a_possible_stop_is_held_and_released(bpe: Tokenizer) -> None:
    ids = ids_of_bytes(bpe, b"x##y###z")
    stream = TextStream(bpe, ("###",))
    released = run(stream, ids)
    assert [each.text for each in released] == ["x", "", "", "##y", "", "", ""]
    assert released[-1].stopped
    assert stream.text == "x##y"
    assert stream.finish() == Emitted(stopped=True)
    with pytest.raises(ValueError, match="has ended"):
        stream.push(ids[0])


def test_held_text_is_released_at_the_end(bpe: Tokenizer) -> None:
    released = run(TextStream(bpe, ("###",)), ids_of_bytes(bpe, b"x##"))
    assert [each.text for each in released] == ["x", "", "", "##"]
    assert not released[-1].stopped


@pytest.mark.parametrize("stops", [("##x", "#y"), ("#y", "##x"), ("#aab", "###x")])
def test_the_longest_possible_stop_is_held(bpe: Tokenizer, stops: tuple[str, ...]) -> None:
    released = run(TextStream(bpe, stops), ids_of_bytes(bpe, b"z##x"))
    if "##x" in stops:
        assert [each.text for each in released] == ["z", "", "", ""]
    else:
        assert [each.text for each in released] == ["z", "", "", "##x", ""]


def test_a_failed_beginning_may_hold_a_later_one(bpe: Tokenizer) -> None:
    released = run(TextStream(bpe, ("abcd",)), ids_of_bytes(bpe, b"aaabcd"))
    assert [each.text for each in released] == ["", "a", "a", "", "", ""]
    assert released[-1].stopped


def test_the_earliest_start_wins(bpe: Tokenizer) -> None:
    token = bpe.token_id("Hello")
    ids = [token] if token is not None else bpe.encode("Hello")
    stream = TextStream(bpe, ("lo", "ell"))
    assert run(stream, ids)[-1].stopped
    assert stream.text == "H"


def test_the_end_may_complete_a_stop(bpe: Tokenizer) -> None:
    released = run(TextStream(bpe, ("\ufffd",)), ids_of_bytes(bpe, b"a\xf0"))
    assert released[-1] == Emitted("", [], stopped=True)


def test_a_straddling_token_is_reported_whole_and_a_cut_one_not(bpe: Tokenizer) -> None:
    tool = bpe.token_id("<tool é>")
    assert tool is not None
    ids = [*ids_of_bytes(bpe, b"a"), tool, *ids_of_bytes(bpe, b"bc")]
    entries = [logprob_entry(bpe, id, -1.0, []) for id in ids]
    stream = TextStream(bpe, (" é>b",))
    released = run(stream, ids, entries)
    assert stream.text == "a<tool"
    assert [e["token"] for each in released for e in each.logprobs] == ["a", "<tool é>"]
    assert (released[1].text, released[1].logprobs) == ("<tool", [])
    assert (released[2].text, released[2].stopped) == ("", True)


def test_a_special_token_has_an_entry_but_no_text(bpe: Tokenizer) -> None:
    start = bpe.token_id("<|start|>")
    assert start is not None
    ids = [start, *ids_of_bytes(bpe, b"a"), start]
    released = run(TextStream(bpe), ids, [logprob_entry(bpe, id, -1.0, []) for id in ids])
    assert [each.text for each in released] == ["", "a", "", ""]
    assert [[e["bytes"] for e in each.logprobs] for each in released] == [
        [],
        [None, [97]],
        [],
        [None],
    ]
    assert released[1].logprobs[0]["token"] == "<|start|>"


def test_only_the_text_loses_its_leading_space(by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = by_kind["llama"]
    hello, world = tokenizer.token_id("\u2581Hello"), tokenizer.token_id("\u2581world")
    assert hello is not None
    assert world is not None
    ids = [hello, world]
    released = run(TextStream(tokenizer), ids, [logprob_entry(tokenizer, id, -1, []) for id in ids])
    assert [each.text for each in released] == ["Hello", " world", ""]
    assert [e["token"] for each in released for e in each.logprobs] == ["Hello", " world"]
    assert released[0].logprobs[0]["bytes"] == list(b"Hello")
    assert by_kind["gemma"].decode(ids) == " Hello world"


def test_an_entry_has_the_api_s_four_keys(bpe: Tokenizer) -> None:
    [rocket, *_] = ids_of_bytes(bpe, b"\xf0")
    [a] = ids_of_bytes(bpe, b"a")
    assert logprob_entry(bpe, a, -0.5, [(a, -0.5), (rocket, -2.0)]) == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "\\xf0", "logprob": -2.0, "bytes": [240]},
        ],
    }


def test_a_long_stop_string_costs_little(bpe: Tokenizer) -> None:
    ids = ids_of_bytes(bpe, b"ab" * 1_000)
    stop = "ab" * 20_000 + "c"
    assert run(TextStream(bpe, (stop,)), ids)[-1].text == "ab" * 1_000
