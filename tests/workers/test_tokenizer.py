"""Byte-exact text from any tokens: laws over random ids, against one-shot decoding."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from orchestrator.errors import RequestError, WorkerError
from workers.tokenizer import Emitted, LogprobEntry, TextStream, Tokenizer, logprob_entry

CORPUS = [
    "Hello world, hello there. What is 12 + 34? 12 + 34 = 46",
    "naïve café, Straße, größer; \u65e5\u672c\u8a9e \u65e5\u672c; \U0001f680\U0001f680",
    "a family: \U0001f468\u200d\U0001f469\u200d\U0001f467, a flag: \U0001f1e9\U0001f1ea",
    "STOP stop </s> <stop> ###\n\n### abab ababab",
]
WORDS = [
    "\u2581",
    "\u2581Hello",
    "\u2581world",
    "Hello",
    "a",
    "b",
    "\u2581a",
    "\u2581\u2581",
    "!",
    "é",
    "\n",
]

specials = [AddedToken("<|end|>", special=True), AddedToken("<|start|>", special=True)]


def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken("<tool é>", special=False, normalized=False)])
    return made


def sentence_piece(decoder: decoders.Decoder, byte_fallback: bool = True) -> tokenizers.Tokenizer:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback), *WORDS]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=byte_fallback)
    )
    made.decoder = decoder
    made.add_special_tokens(specials)
    return made


def llama() -> tokenizers.Tokenizer:
    strip = decoders.Strip(" ", 1, 0)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    return sentence_piece(decoders.Sequence(steps))


def gemma() -> tokenizers.Tokenizer:
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    return sentence_piece(decoders.Sequence(steps))


def metaspace() -> tokenizers.Tokenizer:
    return sentence_piece(decoders.Metaspace(), byte_fallback=False)


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "llama": llama,
    "gemma": gemma,
    "metaspace": metaspace,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, make in KINDS.items():
        made[name] = tmp_path_factory.mktemp(name)
        make().save(str(made[name] / "tokenizer.json"))
    return made


@pytest.fixture(scope="session")
def by_kind(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def bpe(by_kind: dict[str, Tokenizer]) -> Tokenizer:
    return by_kind["byte_level"]


def all_bytes(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(id) for id in ids)


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


# --- tokens and their bytes


def test_the_true_bytes_of_tokens(by_kind: dict[str, Tokenizer]) -> None:
    bpe, llama, metaspace = (by_kind[kind] for kind in ("byte_level", "llama", "metaspace"))
    for byte in range(256):
        assert any(bpe.token_bytes(id) == bytes([byte]) for id in range(bpe.vocab_size))
        id = llama.token_id(f"<0x{byte:02X}>")
        assert id is not None
        assert llama.token_bytes(id) == bytes([byte])
    for tokenizer in (llama, metaspace):
        id = tokenizer.token_id("\u2581Hello")
        assert id is not None
        assert tokenizer.token_bytes(id) == b" Hello"


def test_added_tokens_are_their_text_and_specials_have_none(bpe: Tokenizer) -> None:
    added, special = bpe.token_id("<tool é>"), bpe.token_id("<|end|>")
    assert added is not None
    assert special is not None
    assert bpe.token_bytes(added) == "<tool é>".encode()
    assert bpe.token_bytes(special) == b""
    assert (bpe.is_special(added), bpe.is_special(special)) == (False, True)
    assert bpe.token(special) == "<|end|>"
    assert bpe.token_id("no such token") is None


@pytest.mark.parametrize("text", [*CORPUS, "", " leading", "\U0001f9ff unseen \x00\x7f"])
def test_byte_level_text_comes_back(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all_bytes(bpe, ids) == text.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_is_that_of_the_library(
    folders: dict[str, Path], by_kind: dict[str, Tokenizer], kind: str
) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    words = ["\u2581Hello", "\u2581world", "!", "<|end|>", "\u2581a", "\u2581", "\u2581\u2581", "b"]
    words += [*"Hello", "\u0120world", "<tool é>"] if kind == "byte_level" else []
    ids = [id for id in map(theirs.token_to_id, words) if id is not None]
    assert len(ids) > 6
    for start in range(len(ids)):
        some = ids[start:] + ids[:start]
        assert by_kind[kind].decode(some) == theirs.decode(some, skip_special_tokens=True)


def test_special_tokens_in_a_text_become_their_ids_and_nothing_is_added(bpe: Tokenizer) -> None:
    end = bpe.token_id("<|end|>")
    assert bpe.encode("a<|end|>b") == [*bpe.encode("a"), end, *bpe.encode("b")]


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    made = byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    for text in ("a", "Hello world, hello there. " * 10):
        assert all_bytes(tokenizer, tokenizer.encode(text)) == text.encode()
        assert tokenizer.token_id("<|end|>") not in tokenizer.encode(text)


def test_ids_the_vocabulary_leaves_out_have_no_text(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 7}, []))
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == 8
    assert tokenizer.decode([0, 3, 7]) == "ab"
    assert tokenizer.token(3) == ""


def test_half_a_surrogate_pair_is_the_requests_error(bpe: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not valid Unicode") as caught:
        bpe.encode("a\ud83d")
    assert caught.value.code == "invalid_text"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no tokenizer.json"),
        ("{", "not a tokenizer"),
        ("{}", "not a tokenizer"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(WorkerError, match=message) as caught:
        Tokenizer(tmp_path)
    assert caught.value.code == "model"


@pytest.mark.parametrize(
    "decoder", [None, decoders.WordPiece(), decoders.Sequence([decoders.Replace("x", " ")])]
)
def test_an_unknown_decoder_is_refused_by_name(
    tmp_path: Path, decoder: decoders.Decoder | None
) -> None:
    made = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        made.decoder = decoder
    made.save(str(tmp_path / "tokenizer.json"))
    name = json.loads((tmp_path / "tokenizer.json").read_text())["decoder"]
    with pytest.raises(WorkerError, match="is not supported") as caught:
        Tokenizer(tmp_path)
    assert name is None or name["type"] == "Sequence" or name["type"] in caught.value.message


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
    stream = tokenizer.stream(stops)
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
    golden = run(tokenizer.stream(stops), ids, entries)
    for at in range(min(len(ids), len(golden))):
        stream = tokenizer.stream(stops)
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
    released = run(tokenizer.stream(stops), ids, entries)
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


def ids_of_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    single = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    return [single[bytes([byte])] for byte in data]


def test_an_emoji_is_held_until_it_is_whole(bpe: Tokenizer) -> None:
    ids = ids_of_bytes(bpe, "a\U0001f680b".encode())
    entries = [logprob_entry(bpe, id, -1.0, []) for id in ids]
    released = run(bpe.stream(), ids, entries)
    assert [each.text for each in released] == ["a", "", "", "", "\U0001f680", "b", ""]
    assert [len(each.logprobs) for each in released] == [1, 0, 0, 0, 4, 1, 0]
    assert released[4].logprobs[0]["token"] == "\\xf0"
    assert [entry["bytes"] for entry in released[4].logprobs] == [[240], [159], [154], [128]]


def test_a_dangling_sequence_is_one_replacement(bpe: Tokenizer) -> None:
    released = run(bpe.stream(), ids_of_bytes(bpe, b"a\xf0\x9f\x92"))
    assert [each.text for each in released] == ["a", "", "", "", "\ufffd"]


def test_a_broken_sequence_is_one_replacement_and_the_rest(bpe: Tokenizer) -> None:
    released = run(bpe.stream(), ids_of_bytes(bpe, b"\xf0\x9fA"))
    assert [each.text for each in released] == ["", "", "\ufffdA", ""]


def test_a_possible_stop_is_held_and_released(bpe: Tokenizer) -> None:
    ids = ids_of_bytes(bpe, b"x##y###z")
    stream = bpe.stream(("###",))
    released = run(stream, ids)
    assert [each.text for each in released] == ["x", "", "", "##y", "", "", ""]
    assert released[-1].stopped
    assert stream.text == "x##y"
    assert stream.finish() == Emitted(stopped=True)
    with pytest.raises(ValueError, match="has ended"):
        stream.push(ids[0])


def test_held_text_is_released_at_the_end(bpe: Tokenizer) -> None:
    released = run(bpe.stream(("###",)), ids_of_bytes(bpe, b"x##"))
    assert [each.text for each in released] == ["x", "", "", "##"]
    assert not released[-1].stopped


@pytest.mark.parametrize("stops", [("##x", "#y"), ("#y", "##x"), ("#aab", "###x")])
def test_the_longest_possible_stop_is_held(bpe: Tokenizer, stops: tuple[str, ...]) -> None:
    released = run(bpe.stream(stops), ids_of_bytes(bpe, b"z##x"))
    if "##x" in stops:
        assert [each.text for each in released] == ["z", "", "", ""]
    else:
        assert [each.text for each in released] == ["z", "", "", "##x", ""]


def test_a_failed_beginning_may_hold_a_later_one(bpe: Tokenizer) -> None:
    released = run(bpe.stream(("abcd",)), ids_of_bytes(bpe, b"aaabcd"))
    assert [each.text for each in released] == ["", "a", "a", "", "", ""]
    assert released[-1].stopped


def test_the_earliest_start_wins(bpe: Tokenizer) -> None:
    token = bpe.token_id("Hello")
    ids = [token] if token is not None else bpe.encode("Hello")
    stream = bpe.stream(("lo", "ell"))
    assert run(stream, ids)[-1].stopped
    assert stream.text == "H"


def test_the_end_may_complete_a_stop(bpe: Tokenizer) -> None:
    released = run(bpe.stream(("\ufffd",)), ids_of_bytes(bpe, b"a\xf0"))
    assert released[-1] == Emitted("", [], stopped=True)


def test_a_straddling_token_is_reported_whole_and_a_cut_one_not(bpe: Tokenizer) -> None:
    tool = bpe.token_id("<tool é>")
    assert tool is not None
    ids = [*ids_of_bytes(bpe, b"a"), tool, *ids_of_bytes(bpe, b"bc")]
    entries = [logprob_entry(bpe, id, -1.0, []) for id in ids]
    stream = bpe.stream((" é>b",))
    released = run(stream, ids, entries)
    assert stream.text == "a<tool"
    assert [e["token"] for each in released for e in each.logprobs] == ["a", "<tool é>"]
    assert (released[1].text, released[1].logprobs) == ("<tool", [])
    assert (released[2].text, released[2].stopped) == ("", True)


def test_a_special_token_has_an_entry_but_no_text(bpe: Tokenizer) -> None:
    start = bpe.token_id("<|start|>")
    assert start is not None
    ids = [start, *ids_of_bytes(bpe, b"a"), start]
    released = run(bpe.stream(), ids, [logprob_entry(bpe, id, -1.0, []) for id in ids])
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
    released = run(tokenizer.stream(), ids, [logprob_entry(tokenizer, id, -1, []) for id in ids])
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
    assert run(bpe.stream((stop,)), ids)[-1].text == "ab" * 1_000
