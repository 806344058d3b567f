"""Calls split from content: any tokens, any cut, every family; a marker never shows."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from orchestrator.errors import WorkerError
from tests.tokenizers_by_hand import with_markers
from tests.workers.walks import allowed, one_by_one, random_tokens
from workers.grammars.constraint import Function, Grammars, Shape
from workers.words.calls import SYNTAXES, CallFormat, CallStream
from workers.words.text import Call, CallDelta, Emitted
from workers.words.tokenizer import Tokenizer, logprob_entry

SEED = 20_261_123
HOW = ("special", "plain", "pieces")
FAMILIES = list(SYNTAXES)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Tokenizer]:
    made: dict[tuple[str, str], Tokenizer] = {}

    def of(family: str, how: str) -> Tokenizer:
        if (family, how) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{how}")
            made[family, how] = with_markers(folder, SYNTAXES[family].markers, how)
        return made[family, how]

    return of


def written(family: str, calls: Sequence[Call]) -> str:
    """As the family's template writes an assistant's calls; by hand, not by the product's table."""
    pairs = [(json.dumps(call.name), call.arguments) for call in calls]
    if family == "hermes":
        bodies = [f'{{"name": {name}, "arguments": {given}}}' for name, given in pairs]
        return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)
    if family == "llama3":
        return "; ".join(f'{{"name": {name}, "parameters": {given}}}' for name, given in pairs)
    if family == "mistral":
        bodies = [f'{{"name": {name}, "arguments": {given}}}' for name, given in pairs]
        return f"[TOOL_CALLS] [{', '.join(bodies)}]"
    return "".join(f"[TOOL_CALLS]{call.name}[ARGS]{call.arguments}" for call in calls)


ARGUMENTS = [
    "{}",
    '{"city": "Paris"}',
    '{"a": [1, {"b": "}]{["}], "c": "\\"quoted\\" \\\\"}',
    '{"text": "é 日本 🚀 \\u00e9 <tool_call> </tool_call> [TOOL_CALLS] ; {"}',
    '{"q": "\\"}{", "r": "x\\\\", "s": "\\\\\\"]"}',
    '{"deep": {"deeper": [[], {}, [{"x": null}]]}, "n": -1.5e3}',
]
CONTENTS = ["", "Hello.", "Let me see: a <tool or a [TOOL thing, 1 < 2 é🚀", "line\nbreak\n<t"]
STOPS = ((), ("###",), ("STOP", "END."))


@dataclass(frozen=True)
class Sample:
    family: str
    content: str
    calls: tuple[Call, ...]

    @property
    def text(self) -> str:
        calls = written(self.family, self.calls)
        if self.family == "llama3" and self.content:
            calls = "<|python_tag|>" + calls
        return self.content + ("\n" if self.content and self.calls else "") + calls


def samples(family: str, rng: random.Random, number: int) -> list[Sample]:
    found = []
    for _ in range(number):
        names = ("f", "get_weather", "a-b_2")
        calls = [Call(rng.choice(names), rng.choice(ARGUMENTS)) for _ in range(rng.randint(1, 3))]
        found.append(Sample(family, rng.choice(CONTENTS), tuple(calls)))
    return found


def run(stream: CallStream, tokens: Sequence[int]) -> list[Emitted]:
    released = []
    for token in tokens:
        released.append(stream.push(token))
        if released[-1].stopped:
            return released
    return [*released, stream.finish()]


def joined(released: Sequence[Emitted]) -> tuple[str, list[Call]]:
    """What a client puts together; the laws of the deltas are checked on the way."""
    calls: list[Call] = []
    for each in released:
        assert not (each.text and calls), "no text after the first call"
        for delta in each.calls:
            if delta.name is not None:
                assert delta.index == len(calls), "indices are dense, a name comes once and first"
                calls.append(Call(delta.name, delta.arguments))
            else:
                assert delta.index == len(calls) - 1
                assert delta.arguments
                calls[-1] = Call(calls[-1].name, calls[-1].arguments + delta.arguments)
    return "".join(each.text for each in released), calls


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_tokens_give_the_same_content_and_calls(
    make: Callable[[str, str], Tokenizer], family: str, how: str
) -> None:
    print(f"seed {SEED}")
    rng, tokenizer = random.Random(SEED), make(family, how)
    for sample in samples(family, rng, 40):
        tokens = random_tokens(tokenizer, sample.text.encode(), rng)
        stream = CallFormat(family).stream(tokenizer, rng.choice(STOPS))
        content, calls = joined(run(stream, tokens))
        assert content == stream.text == sample.content
        assert tuple(calls) == stream.calls == sample.calls


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_anywhere_nothing_of_a_marker_shows(
    make: Callable[[str, str], Tokenizer], family: str, how: str
) -> None:
    print(f"seed {SEED}")
    rng, tokenizer = random.Random(SEED), make(family, how)
    for sample in samples(family, rng, 4):
        data, start = sample.text.encode(), len(sample.content.encode())
        opened = sample.text.find(SYNTAXES[family].opening) + len(SYNTAXES[family].opening)
        opened = len(sample.text[:opened].encode())
        for cut in range(len(data)):
            stream = CallFormat(family).stream(tokenizer)
            tokens = random_tokens(tokenizer, data[:cut], rng)
            content, calls = joined(run(stream, tokens))
            assert (content, tuple(calls)) == (stream.text, stream.calls)
            whole = data[:cut].decode("utf-8", "replace")
            if cut <= start:
                assert content == whole or content == whole[: len(sample.content)]
                continue
            if cut >= opened:
                assert content == sample.content
            for call, true in zip(calls, sample.calls, strict=False):
                assert call.name == true.name
                assert true.arguments.startswith(call.arguments.rstrip("\ufffd"))


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_come_with_their_characters(
    make: Callable[[str, str], Tokenizer], family: str
) -> None:
    """As soon as a character of the arguments is there it is told, and so is a whole name."""
    tokenizer = make(family, "plain")
    sample = Sample(family, "", (Call("f", ARGUMENTS[2]),))
    stream = CallFormat(family).stream(tokenizer)
    before = ""
    for token in one_by_one(tokenizer, sample.text.encode()):
        stream.push(token)
        before += tokenizer.token_bytes(token).decode()
        told = stream.calls[0].arguments if stream.calls else ""
        at = before.rfind(ARGUMENTS[2][0], 0, len(before))
        assert told == "" or before.endswith(told) or told == ARGUMENTS[2], at
    assert stream.calls == sample.calls


@pytest.mark.parametrize("how", HOW)
def test_a_stop_string_counts_in_content_only(
    make: Callable[[str, str], Tokenizer], how: str
) -> None:
    tokenizer, rng = make("hermes", how), random.Random(SEED)
    call = written("hermes", [Call("f", '{"a": "END"}')])
    for text, content, calls in [
        ("one END two\n" + call, "one ", 0),
        ("one EN two\n" + call, "one EN two", 1),
        (call + "END", "", 1),
    ]:
        stream = CallFormat("hermes").stream(tokenizer, ("END",))
        released = run(stream, random_tokens(tokenizer, text.encode(), rng))
        assert (stream.text, len(stream.calls)) == (content, calls)
        assert released[-1].stopped == (calls == 0)
        if calls == 0:
            assert stream.finish() == Emitted(stopped=True)
            with pytest.raises(ValueError, match="has ended"):
                stream.push(0)


def test_a_stop_string_that_looks_like_the_marker(
    make: Callable[[str, str], Tokenizer],
) -> None:
    tokenizer = make("hermes", "pieces")
    stream = CallFormat("hermes").stream(tokenizer, ("<tool",))
    released = run(stream, one_by_one(tokenizer, b"a <tool_call>"))
    assert released[-1].stopped
    assert stream.text == "a "


def test_where_the_beginning_decides_what_follows_is_all_content(
    make: Callable[[str, str], Tokenizer],
) -> None:
    rng, call = random.Random(SEED), written("hermes", [Call("f", "{}")])
    form = CallFormat("hermes").made_exclusive()
    for how in HOW:
        tokenizer = make("hermes", how)
        for text, stops, content, calls in [
            ('{"a": "<tool_call>"}', (), '{"a": "<tool_call>"}', 0),
            (call, (), "", 1),
            ("<tool_cal", (), "<tool_cal", 0),
            ("<tool_x", ("<t",), "", 0),
            ("", (), "", 0),
        ]:
            stream = form.stream(tokenizer, stops)
            run(stream, random_tokens(tokenizer, text.encode(), rng))
            assert (stream.text, len(stream.calls)) == (content, calls)


def test_a_special_closing_marker_alone_is_no_text(
    make: Callable[[str, str], Tokenizer],
) -> None:
    tokenizer = make("hermes", "special")
    stream = CallFormat("hermes").stream(tokenizer)
    assert joined(run(stream, tokenizer.encode("Hi</tool_call>!"))) == ("Hi!", [])


def test_only_content_has_log_probabilities(make: Callable[[str, str], Tokenizer]) -> None:
    tokenizer = make("hermes", "special")
    text = "Hi.\n" + written("hermes", [Call("f", '{"a": 1}')])
    stream = CallFormat("hermes").stream(tokenizer)
    entries = []
    for token in tokenizer.encode(text):
        released = stream.push(token, logprob_entry(tokenizer, token, -1.0, []))
        entries += released.logprobs
    assert bytes(byte for each in entries for byte in each["bytes"]) == b"Hi."
    assert stream.finish().logprobs == []


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>{"arguments":{"a":1},"name":"f"}</tool_call>', [Call("f", '{"a":1}')]),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', [Call("f", "{}")]),
        ('<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}', [Call("f", '{"a": 1}')]),
        ('<tool_call>\n  {"name" : "f" , "arguments" : {"a": 1} } junk', [Call("f", '{"a": 1}')]),
        ('<tool_call>{"arguments": {}}', []),
        ("<tool_call>what?", []),
        ("<tool_call>", []),
    ],
)
def test_what_a_model_may_write_unconstrained(
    make: Callable[[str, str], Tokenizer], text: str, calls: list[Call]
) -> None:
    tokenizer = make("hermes", "plain")
    stream = CallFormat("hermes").stream(tokenizer)
    content, found = joined(run(stream, tokenizer.encode(text)))
    assert (content, found) == ("", calls)


def test_deltas_of_one_call_by_example(make: Callable[[str, str], Tokenizer]) -> None:
    tokenizer = make("hermes", "special")
    stream = CallFormat("hermes").stream(tokenizer)
    text = written("hermes", [Call("f", "{}"), Call("g", '{"é": 1}')])
    told = [d for each in run(stream, one_by_one_marked(tokenizer, text)) for d in each.calls]
    assert told == [
        CallDelta(0, "f"),
        CallDelta(0, None, "{"),
        CallDelta(0, None, "}"),
        CallDelta(1, "g"),
        *(CallDelta(1, None, character) for character in '{"é": 1}'),
    ]


def one_by_one_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Markers as their tokens, all else byte by byte."""
    found: list[int] = []
    for token in tokenizer.encode(text):
        data = tokenizer.token_bytes(token)
        marked = tokenizer.token(token) in SYNTAXES["hermes"].markers
        found += [token] if marked else one_by_one(tokenizer, data)
    return found


# --- which form


HERMES = '{%- for call in calls -%}<tool_call>\n{"name": "\' ~ name ~ \'", "arguments": {}}'
LLAMA = '<|start_header_id|>assistant{{ \'{"name": "\' + n + \'", "parameters": \' }}'
TEMPLATES = [
    (HERMES, "hermes"),
    (LLAMA, "llama3"),
    ("{{ '<|python_tag|>' }}", "llama3"),
    ("{{ '[TOOL_CALLS] [' }}", "mistral"),
    ("[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}", "mistral-args"),
    ("{{ '[TOOL_CALLS]' + name + arguments }}", None),
    ("<tool_call>{{ name }}<arg_key>arguments", None),
    ("<tool_call><function={{ name }}>arguments", None),
    ("<|im_start|>{{ message.content }}<|im_end|>", None),
]


@pytest.mark.parametrize(("template", "name"), TEMPLATES)
def test_the_form_is_seen_in_the_template(tmp_path: Path, template: str, name: str | None) -> None:
    found = CallFormat.of(tmp_path, template)
    assert (found and found.name) == name


def test_tiny_calls_as_hermes_does() -> None:
    folder = Path(__file__).parents[2] / "workers" / "models" / "tiny"
    source = (folder / "chat_template.jinja").read_text()
    assert CallFormat.of(folder, source) == CallFormat("hermes")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ('{"tool_format": "mistral"}', "mistral"),
        ('{"tool_format": null}', None),
        ("{}", "hermes"),
    ],
)
def test_the_models_folder_may_say_it(tmp_path: Path, settings: str, name: str | None) -> None:
    (tmp_path / "penstock.json").write_text(settings)
    found = CallFormat.of(tmp_path, HERMES)
    assert (found and found.name) == name


@pytest.mark.parametrize("settings", ['{"tool_format": "morse"}', '{"tool_format": [1]}', "{"])
def test_what_it_says_must_be_known(tmp_path: Path, settings: str) -> None:
    (tmp_path / "penstock.json").write_text(settings)
    with pytest.raises(WorkerError, match=r"penstock\.json") as caught:
        CallFormat.of(tmp_path, HERMES)
    assert caught.value.code == "model"


# --- free text until a call opens


FUNCTIONS = (Function("f"), Function("fg"))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_masked_before_a_call_but_what_no_call_begins_with(
    make: Callable[[str, str], Tokenizer], family: str, how: str
) -> None:
    """Against brute force: a token may come unless it opens a call that no forced one begins as."""
    print(f"seed {SEED}")
    rng, tokenizer = random.Random(SEED), make(family, how)
    form, grammars = CallFormat(family), Grammars(tokenizer, frozenset({0}))
    free = grammars.compile(Shape(functions=FUNCTIONS), form).grammar
    forced = grammars.compile(Shape(functions=FUNCTIONS, choice="required"), form).grammar
    assert free is not None
    assert forced is not None
    starts = ["", "a", "x\n", "é", "1 < 2", " "]
    opening = SYNTAXES[family].opening
    partial = [opening[:n] for n in range(len(opening))]
    spelled = [
        tokenizer.token_bytes(id) or form.spelled(tokenizer).get(id, b"")
        for id in range(tokenizer.vocab_size)
    ]

    def begins_a_call(data: bytes) -> bool:
        matcher = forced.matcher()
        for token in one_by_one(tokenizer, data):
            if not allowed(matcher.mask(), tokenizer.vocab_size)[token]:
                return False
            matcher.advance(token)
        return True

    for before in [a + b for a in starts for b in partial]:
        matcher = free.matcher()
        for token in random_tokens(tokenizer, before.encode(), rng):
            matcher.advance(token)
        found = allowed(matcher.mask(), tokenizer.vocab_size)
        for id, data in enumerate(spelled):
            text = before.encode() + data
            at = 0 if text[:1] == b"{" and family == "llama3" else text.find(opening.encode())
            fine = at < 0 or not data or begins_a_call(text[at:])
            assert found[id] == fine, (before, data)
        assert found.any()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_from_the_opening_on_only_calls_may_come(
    make: Callable[[str, str], Tokenizer], family: str, how: str
) -> None:
    print(f"seed {SEED}")
    rng, tokenizer = random.Random(SEED), make(family, how)
    form, eos = CallFormat(family), frozenset({0})
    grammar = Grammars(tokenizer, eos).compile(Shape(functions=FUNCTIONS), form).grammar
    assert grammar is not None
    opening = SYNTAXES[family].opening
    logits = np.random.default_rng(SEED)
    for n in range(10):
        content, opens = f"text {n} ", opening
        if family == "llama3" and n % 2:
            content, opens = "", "{"
        matcher, stream = grammar.matcher(), form.stream(tokenizer)
        for token in random_tokens(tokenizer, (content + opens).encode(), rng):
            matcher.advance(token)
            stream.push(token)
        while not matcher.ended:
            open_to = allowed(matcher.mask(), tokenizer.vocab_size)
            token = int(np.where(open_to, logits.normal(size=len(open_to)), -np.inf).argmax())
            if token in eos:
                break
            matcher.advance(token)
            stream.push(token)
        stream.finish()
        assert stream.text == content
        assert stream.calls
        assert grammar.fault(stream.text, stream.calls) is None
