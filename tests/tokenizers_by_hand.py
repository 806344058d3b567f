"""Small tokenizers of every kind the product reads, made in the tests and saved to folders."""

from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from workers.words.tokenizer import Tokenizer

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


def all_bytes(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(id) for id in ids)


def ids_of_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    single = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    return [single[bytes([byte])] for byte in data]


# Tokens that hold a part of a marker, or of what opens a call, and go on.
STRADDLING = ("{}", '{"', '{"name', ">\n", ">\n{", ">x", "] [", "]x", "]f", "|>{", "|>x", "x\n<")


def with_markers(folder: Path, markers: tuple[str, ...], how: str) -> Tokenizer:
    """A byte-level tokenizer whose `markers` are `special` tokens, `plain` ones, or `pieces`.

    A few of its tokens straddle markers; one holds a whole one between other text.
    """
    made = byte_level()
    added = [AddedToken(each, special=how == "special") for each in markers if how != "pieces"]
    straddling = [*STRADDLING, f"a{markers[0]}b", f"a{markers[0]}\n"]
    made.add_tokens(added + [AddedToken(each, special=False) for each in straddling])
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)
