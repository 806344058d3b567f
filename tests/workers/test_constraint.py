"""Grammars against a JSON Schema validator, over hundreds of schemas and random logits."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from jsonschema.validators import validator_for

from orchestrator.errors import RequestError
from tests.workers.walks import Walk, allowed, closers, walk
from workers.grammars.constraint import Function, GrammarError, Grammars, Shape
from workers.words.calls import SYNTAXES, CallFormat
from workers.words.text import Call
from workers.words.tokenizer import Tokenizer

SCHEMAS = Path(__file__).parents[1] / "schemas"
TINY = Path(__file__).parents[2] / "workers" / "models" / "tiny"
EOS = frozenset({500, 498})
SEED = 20_261_123
WALKS = 8
CHECKED_FORMATS = jsonschema.FormatChecker(("date", "ipv4", "ipv6", "uuid", "email"))
NAMES = sorted(path.stem for path in SCHEMAS.glob("*.json"))


def schemas(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text())
    return found


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer(TINY)


@pytest.fixture(scope="module")
def grammars(tiny: Tokenizer) -> Grammars:
    return Grammars(tiny, EOS)


def validator(schema: Any) -> Any:
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(schema, format_checker=CHECKED_FORMATS)


def walk_of(
    tiny: Tokenizer, grammars: Grammars, shape: Shape, form: CallFormat | None, seed: int
) -> tuple[Walk, str | None]:
    """A random completion, and what our own check finds wrong with it."""
    compiled = grammars.compile(shape, form)
    assert compiled.grammar is not None
    assert compiled.warnings == ()
    walked = walk(tiny, EOS, compiled.grammar, compiled.calls, seed)
    fault = None
    if walked.end != "length":
        fault = compiled.grammar.fault(walked.text, walked.calls)
    return walked, fault


# --- content by schema


def test_there_are_two_hundred_schemas() -> None:
    assert sum(len(schemas(name)) for name in NAMES) >= 200


@pytest.mark.parametrize("name", NAMES)
def test_every_finished_text_is_valid_json_by_its_schema(
    tiny: Tokenizer, grammars: Grammars, name: str
) -> None:
    print(f"seed {SEED}")
    finished = tried = 0
    for at, (title, schema) in enumerate(schemas(name).items()):
        check, shape = validator(schema), Shape(schema=schema, strict=True)
        for n in range(WALKS):
            walked, fault = walk_of(tiny, grammars, shape, None, SEED + 100 * at + n)
            tried += 1
            if walked.end == "length":
                continue
            finished += 1
            value = json.loads(walked.text)
            wrong = [each.message for each in check.iter_errors(value)]
            assert not wrong, f"{title}: {walked.text}: {wrong}"
            assert fault is None, f"{title}: {walked.text}"
            assert no_space_is_free(walked.text), f"{title}: {walked.text!r}"
    assert finished >= 0.85 * tried, f"{finished} of {tried} walks finished"


def no_space_is_free(text: str) -> bool:
    """Outside of strings there is one space after a comma and a colon, and no other."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "s", text)
    return re.fullmatch(r"(?:[,:] |[^\s,:])*", bare) is not None


def test_a_model_that_wants_white_space_gets_none(tiny: Tokenizer, grammars: Grammars) -> None:
    blank = [tiny.token_bytes(id).isspace() for id in range(tiny.vocab_size)]
    bias = 50.0 * np.array(blank)
    for schema in schemas("nesting").values():
        grammar = grammars.compile(Shape(schema=schema), None).grammar
        assert grammar is not None
        matcher, inside = grammar.matcher(), False
        walked = walk(tiny, EOS, grammar, None, SEED, 60, bias)
        for token in walked.tokens:
            matcher.mask()
            matcher.advance(token)
            assert inside or not tiny.token_bytes(token).isspace() or token == 220
        assert "  " not in re.sub(r'"[^"]*("|$)', "", walked.text)


@pytest.mark.parametrize("schema", [{"type": "object"}, {}])
def test_json_object_is_any_object(tiny: Tokenizer, grammars: Grammars, schema: Any) -> None:
    ended = 0
    for n in range(20):
        walked, fault = walk_of(tiny, grammars, Shape(schema=schema), None, SEED + n)
        if walked.end != "length":
            ended += 1
            assert fault is None
            assert "type" not in schema or isinstance(json.loads(walked.text), dict)
    assert ended >= 10


REFUSED = json.loads((SCHEMAS / "refused" / "refused.json").read_text())


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_strict_schema_without_a_grammar_is_refused_with_the_reason(
    grammars: Grammars, name: str
) -> None:
    schema, reason = REFUSED[name]
    with pytest.raises(GrammarError) as caught:
        grammars.compile(Shape(schema=schema, strict=True), None)
    assert caught.value.where == "response_format"
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason
    assert "%json" not in caught.value.reason.replace('"%json"', "")


@pytest.mark.parametrize("name", list(REFUSED))
def test_one_that_is_not_strict_is_let_go_with_a_warning(grammars: Grammars, name: str) -> None:
    schema, reason = REFUSED[name]
    compiled = grammars.compile(Shape(schema=schema), None)
    assert compiled.grammar is None
    [warning] = compiled.warnings
    assert warning.startswith("response_format: ")
    assert reason in warning


def test_a_schema_nested_beyond_all_measure_is_refused(grammars: Grammars) -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(GrammarError, match="too deeply"):
        grammars.compile(Shape(schema=schema, strict=True), None)


# --- calls


WEATHER = Function(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "days": {"$ref": "#/$defs/Days"},
            "unit": {"enum": ["C", "F", None]},
        },
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 14}},
    },
)
ADD = Function(
    "add-up_2",
    {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    strict=True,
)
BARE = Function("now")
ALL = (WEATHER, ADD, BARE)
FORMS = [CallFormat(name) for name in SYNTAXES]


def check_calls(calls: tuple[Call, ...], functions: tuple[Function, ...]) -> None:
    """Independently of the product's own check."""
    given = {each.name: each.parameters for each in functions}
    for call in calls:
        arguments = json.loads(call.arguments)
        assert isinstance(arguments, dict)
        parameters = given[call.name]
        if parameters is None:
            assert arguments == {}
        else:
            validator(parameters).validate(arguments)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_name_a_function_and_match_its_schema(
    tiny: Tokenizer, grammars: Grammars, form: CallFormat, parallel: bool
) -> None:
    shape = Shape(functions=ALL, choice="required", parallel=parallel)
    names: set[str] = set()
    most = ended = 0
    for n in range(25):
        walked, fault = walk_of(tiny, grammars, shape, form, SEED + n)
        assert walked.text == ""
        if walked.end == "length":
            continue
        ended += 1
        assert fault is None
        assert walked.calls
        check_calls(walked.calls, ALL)
        names |= {call.name for call in walked.calls}
        most = max(most, len(walked.calls))
        assert parallel or walked.end == "ended"
    assert ended >= 15
    assert names == {each.name for each in ALL}
    assert (most > 1) == parallel


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_named_function_is_the_only_one_and_called_once(
    tiny: Tokenizer, grammars: Grammars, form: CallFormat
) -> None:
    shape = Shape(functions=(WEATHER,), choice="named", parallel=False)
    for n in range(15):
        walked, fault = walk_of(tiny, grammars, shape, form, SEED + n)
        assert walked.end == "ended"
        assert fault is None
        assert [call.name for call in walked.calls] == ["get_weather"]
        check_calls(walked.calls, (WEATHER,))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_schema_of_an_object_can_be_a_functions(
    tiny: Tokenizer, grammars: Grammars, form: CallFormat
) -> None:
    print(f"seed {SEED}")
    for name in ("objects", "examples", "references"):
        for title, schema in schemas(name).items():
            if schema.get("type") != "object":
                continue
            function = Function("f", schema, strict=True)
            shape = Shape(functions=(function,), choice="required", parallel=False)
            walked, fault = walk_of(tiny, grammars, shape, form, SEED)
            if walked.end != "length":
                assert fault is None, f"{title}: {walked.calls}"
                check_calls(walked.calls, (function,))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_content_by_schema_or_calls(tiny: Tokenizer, grammars: Grammars, form: CallFormat) -> None:
    """JSON that holds the markers is content; what begins with one is calls."""
    marker = form.syntax.opening
    schema = {
        "type": "object",
        "properties": {"x": {"enum": [marker, "{", 1]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    shape, kinds = Shape(schema=schema, functions=ALL), set()
    for n in range(40):
        walked, fault = walk_of(tiny, grammars, shape, form, SEED + n)
        if walked.end == "length":
            continue
        assert fault is None
        kinds.add(bool(walked.calls))
        if walked.calls:
            assert walked.text == ""
            check_calls(walked.calls, ALL)
        else:
            validator(schema).validate(json.loads(walked.text))
    assert kinds == {True, False}


def test_tools_without_a_form_of_calls_are_refused(grammars: Grammars) -> None:
    with pytest.raises(GrammarError) as caught:
        grammars.compile(Shape(functions=ALL), None)
    assert caught.value.where == "tools"


@pytest.mark.parametrize("name", [*REFUSED, "a string"])
def test_a_function_without_a_grammar_of_its_own(
    tiny: Tokenizer, grammars: Grammars, name: str
) -> None:
    schema = REFUSED[name][0] if name in REFUSED else {"type": "string"}
    strict = (BARE, Function("f", schema, strict=True))
    with pytest.raises(GrammarError) as caught:
        grammars.compile(Shape(functions=strict), CallFormat("hermes"))
    assert caught.value.where == "tools[1].function.parameters"
    loose = Shape(functions=(Function("f", schema),), choice="required", parallel=False)
    compiled = grammars.compile(loose, CallFormat("hermes"))
    [warning] = compiled.warnings
    assert warning.startswith("tools[0].function.parameters: ")
    assert compiled.grammar is not None
    for n in range(3):
        walked = walk(tiny, EOS, compiled.grammar, compiled.calls, SEED + n)
        if walked.end != "length":
            assert isinstance(json.loads(walked.calls[0].arguments), dict)


# --- the matcher


def test_free_text_has_no_mask_until_a_call_opens(tiny: Tokenizer, grammars: Grammars) -> None:
    grammar = grammars.compile(Shape(functions=ALL), CallFormat("hermes")).grammar
    assert grammar is not None
    matcher = grammar.matcher()
    for token in tiny.encode("What is 1 < 2? A <tool is no <tool_call and < is no </tool_call>.\n"):
        assert matcher.mask() is None
        matcher.advance(token)
    [marker] = tiny.encode("<tool_call>")
    matcher.advance(marker)
    mask = matcher.mask()
    assert mask is not None
    assert [tiny.token_bytes(int(id)) for id in np.flatnonzero(allowed(mask, 503))] == [b"\n"]


def test_a_matcher_is_a_function_of_its_tokens(tiny: Tokenizer, grammars: Grammars) -> None:
    shape = Shape(functions=ALL, choice="required")
    grammar = grammars.compile(shape, CallFormat("hermes")).grammar
    assert grammar is not None
    walked = walk(tiny, EOS, grammar, CallFormat("hermes"), SEED)
    matcher = grammar.matcher()
    for at, token in enumerate(walked.tokens):
        again = grammar.matcher()
        for earlier in walked.tokens[:at]:
            again.advance(earlier)  # without masks in between, as tokens are replayed
        here, there = matcher.mask(), again.mask()
        assert here is not None
        assert there is not None
        assert (here == there).all()
        matcher.advance(token)


def test_a_token_that_may_not_come_is_the_requests_error(grammars: Grammars) -> None:
    grammar = grammars.compile(Shape(schema={"type": "integer"}), None).grammar
    assert grammar is not None
    with pytest.raises(RequestError) as caught:
        grammar.matcher().advance(0)
    assert caught.value.code == "grammar"


def test_grammars_are_kept_and_given_up(grammars: Grammars) -> None:
    shape = Shape(schema={"const": "kept"})
    assert grammars.compile(shape, None) is grammars.compile(shape, None)
    first = grammars.compile(shape, None)
    for n in range(100):
        grammars.compile(Shape(schema={"const": n}), None)
    assert grammars.compile(shape, None) is not first


@pytest.mark.parametrize(
    ("text", "calls", "found"),
    [
        ("", (Call("now", "{}"),), None),
        ("", (), "0 calls"),
        ("", (Call("now", "{}"), Call("now", "{}")), "2 calls"),
        ("", (Call("later", "{}"),), "later"),
        ("", (Call("now", "{"),), "not JSON"),
        ("", (Call("now", '{"a": 1}'),), "do not match"),
    ],
)
def test_faults_of_calls(
    grammars: Grammars, text: str, calls: tuple[Call, ...], found: str | None
) -> None:
    shape = Shape(functions=(BARE,), choice="required", parallel=False)
    grammar = grammars.compile(shape, CallFormat("hermes")).grammar
    assert grammar is not None
    fault = grammar.fault(text, calls)
    assert fault is None if found is None else fault and found in fault


def test_a_vocabulary_without_an_end(tiny: Tokenizer) -> None:
    grammar = Grammars(tiny, frozenset()).compile(Shape(schema={"enum": [1, 12]}), None).grammar
    assert grammar is not None
    matcher = grammar.matcher()
    matcher.advance(tiny.encode("1")[0])
    [two] = np.flatnonzero(allowed(matcher.mask(), tiny.vocab_size))
    assert tiny.token_bytes(int(two)) == b"2"
    matcher.advance(int(two))
    assert matcher.ended
    assert closers(tiny).sum() > 5


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_every_kind_of_vocabulary(by_kind: dict[str, Tokenizer], kind: str) -> None:
    """Word starts and single bytes too: a space before the text is no part of it."""
    tokenizer = by_kind[kind]
    end = tokenizer.token_id("<|end|>")
    assert end is not None
    eos, finished = frozenset({end}), 0
    grammars = Grammars(tokenizer, eos)
    schema = WEATHER.parameters
    assert schema is not None
    for n in range(6):
        for name in SYNTAXES:
            shape = Shape(functions=(Function("f", schema), BARE), choice="required")
            compiled = grammars.compile(shape, CallFormat(name))
            assert compiled.grammar is not None
            walked = walk(tokenizer, eos, compiled.grammar, compiled.calls, SEED + n)
            if walked.end != "length":
                finished += 1
                assert walked.text == ""
                assert compiled.grammar.fault(walked.text, walked.calls) is None
        compiled = grammars.compile(Shape(schema=schema), None)
        assert compiled.grammar is not None
        walked = walk(tokenizer, eos, compiled.grammar, None, SEED + n)
        if walked.end != "length":
            finished += 1
            validator(schema).validate(json.loads(walked.text))
            assert walked.text.startswith("{")
        first = np.flatnonzero(allowed(compiled.grammar.matcher().mask(), tokenizer.vocab_size))
        begins = {tokenizer.token_bytes(int(id))[:1] for id in first}
        assert begins == ({b" ", b"{"} if kind == "llama" else {b"{"})
    assert finished >= 20


def test_an_end_that_is_no_special_token_is_no_text(tiny: Tokenizer) -> None:
    [end] = tiny.encode("</tool_call>")
    grammar = Grammars(tiny, frozenset({end})).compile(Shape(schema={"type": "string"}), None)
    assert grammar.grammar is not None
    matcher = grammar.grammar.matcher()
    matcher.advance(tiny.encode('"')[0])
    assert not allowed(matcher.mask(), tiny.vocab_size)[end]


def test_many_threads_may_use_one_models_grammars(tiny: Tokenizer) -> None:
    grammars = Grammars(tiny, EOS)
    shapes = [Shape(schema=schema) for schema in schemas("examples").values()]
    shapes += [Shape(functions=ALL), Shape(functions=ALL, choice="required")]

    def all_walks(seed: int) -> list[Walk]:
        compiled = [grammars.compile(shape, CallFormat("hermes")) for shape in shapes]
        return [walk(tiny, EOS, c.grammar, c.calls, seed, 80) for c in compiled if c.grammar]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(all_walks, [SEED, SEED + 1] * 4))
    alone = [all_walks(SEED), all_walks(SEED + 1)]
    assert found == alone * 4
