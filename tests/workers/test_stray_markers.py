"""Markers that close what is not open are no content, however the tokens cut them."""

import random
from pathlib import Path

import pytest

from tests.tokenizers_by_hand import with_markers
from tests.workers.walks import random_tokens
from workers.words.calls import SYNTAXES, CallFormat
from workers.words.tokenizer import logprob_entry

SEED = 20_261_123
STRAY = [
    (family, marker)
    for family, syntax in SYNTAXES.items()
    for marker in syntax.markers
    if marker != syntax.opening
]


@pytest.mark.parametrize("how", ["special", "plain", "pieces"])
@pytest.mark.parametrize(("family", "marker"), STRAY)
def test_a_stray_marker_is_no_content(family: str, marker: str, how: str, tmp_path: Path) -> None:
    tokenizer = with_markers(tmp_path, SYNTAXES[family].markers, how)
    rng = random.Random(SEED)
    for before, after in [("", ""), ("é🚀 a", " b"), ("</tool_cal", "x</"), (marker, "é" + marker)]:
        text = f"{before}{marker}{after}"
        for _ in range(30):
            stream = CallFormat(family).stream(tokenizer)
            ids = random_tokens(tokenizer, text.encode(), rng)
            spelled = CallFormat(family).spelled(tokenizer)
            emitted = [stream.push(id, logprob_entry(tokenizer, id, -1.0, ())) for id in ids]
            emitted.append(stream.finish())
            expected = text.replace(marker, "")
            assert "".join(each.text for each in emitted) == stream.text == expected, SEED
            assert not stream.calls
            if before != marker:
                told = [entry["token"] for each in emitted for entry in each.logprobs]
                pieces = [spelled.get(id) or tokenizer.token_bytes(id) for id in ids]
                outside = zip(ids, _outside(pieces, text, marker), strict=True)
                kept = [
                    logprob_entry(tokenizer, id, 0.0, ())["token"] for id, out in outside if out
                ]
                assert [t for t in told if t != marker] == [t for t in kept if t != marker]


def _outside(pieces: list[bytes], text: str, marker: str) -> list[bool]:
    """Whether each token has a byte outside of the one marker; such entries are told whole."""
    begin = text.encode().index(marker.encode())
    end, at, found = begin + len(marker.encode()), 0, []
    for piece in pieces:
        found.append(not (begin <= at and at + len(piece) <= end))
        at += len(piece)
    return found


def test_a_stop_string_that_is_a_marker_still_stops(tmp_path: Path) -> None:
    tokenizer = with_markers(tmp_path, SYNTAXES["hermes"].markers, "pieces")
    stream = CallFormat("hermes").stream(tokenizer, ("</tool_call>",))
    for id in tokenizer.encode("all well</tool_call>"):
        emitted = stream.push(id)
    assert emitted.stopped
    assert stream.text == "all well"
