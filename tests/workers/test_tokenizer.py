"""Tokens, their bytes and their ids: the vocabularies of every kind against the library's own."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from orchestrator.errors import RequestError, WorkerError
from tests.tokenizers_by_hand import CORPUS, KINDS, all_bytes, byte_level
from workers.words.tokenizer import Tokenizer


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
