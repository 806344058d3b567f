"""Every schema through the engine at temperature 1.5, on `tiny` and on random logits.

Whatever ends by itself matches its schema, by a validator that the product does not choose; calls
that are forced name a given function and match its parameters.
"""

import json
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from jsonschema import ValidationError
from jsonschema.validators import Draft202012Validator, extend, validator_for

from orchestrator.settings import Settings
from tests.fake_runner import FakeRunner
from workers.drawing.sampler import Sampling
from workers.engine.engine import Choice, Completion, Engine, Failed, Finished, Tokens
from workers.folders.folder import TINY, ModelFolder
from workers.grammars.constraint import Function, Shape
from workers.loading.model import LoadedModel

SCHEMAS: dict[str, Any] = {
    f"{file.stem}: {title}": schema
    for file in sorted((Path(__file__).parents[1] / "schemas").glob("*.json"))
    for title, schema in json.loads(file.read_text(encoding="utf-8")).items()
}
SETTINGS = Settings(threads=2, slots=32, max_context=400)
MAX_TOKENS = 160
PROMPT = "Extract as JSON with keys name, age, city: Anna is 31 years old and lives in Rome."


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return LoadedModel.load(ModelFolder.load(TINY), SETTINGS)


@pytest.fixture(params=["tiny", "random logits"])
def engine(request: pytest.FixtureRequest, tiny: LoadedModel) -> Iterator[Engine]:
    runner: Any = tiny.runner
    if request.param != "tiny":
        runner = FakeRunner(tiny.tokenizer.vocab_size, slots=32, max_length=400)
    engine = Engine(runner, tiny.tokenizer, tiny.eos)
    yield engine
    engine.close()


def run(engine: Engine, tiny: LoadedModel, shapes: Sequence[Shape]) -> list[Any]:
    """(finish_reason, text, [(name, arguments)]) of one completion for each shape."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    text = tiny.template.render([{"role": "user", "content": PROMPT}])
    prompt = tuple(tiny.tokenizer.encode(text))
    for at, shape in enumerate(shapes):
        compiled = tiny.wording.grammars.compile(shape, tiny.wording.calls)
        assert not compiled.warnings, (at, compiled.warnings)
        sampling = Sampling(temperature=1.5, seed=seed + at)
        completion = Completion(
            at,
            prompt,
            sampling,
            (Choice(0),),
            max_tokens=MAX_TOKENS,
            grammar=compiled.grammar,
            calls=compiled.calls,
        )
        engine.admit(completion)
    calls: dict[int, dict[int, list[str]]] = {at: {} for at in range(len(shapes))}
    ends: dict[int, Finished] = {}
    while not engine.idle:
        for event in engine.step():
            assert not isinstance(event, Failed), (event, shapes[event.id])
            if isinstance(event, Finished):
                ends[event.id] = event
            elif isinstance(event, Tokens):
                for delta in event.calls:
                    name_and_arguments = calls[event.id].setdefault(delta.index, ["", ""])
                    name_and_arguments[0] += delta.name or ""
                    name_and_arguments[1] += delta.arguments
    assert ends.keys() == calls.keys()
    return [
        (ends[at].finish_reason, ends[at].text, [tuple(c) for c in calls[at].values()])
        for at in range(len(shapes))
    ]


def test_what_ends_matches_its_schema(engine: Engine, tiny: LoadedModel) -> None:
    assert len(SCHEMAS) >= 200
    found = run(engine, tiny, [Shape(schema=schema) for schema in SCHEMAS.values()])
    ended = 0
    for (title, schema), (reason, text, calls) in zip(SCHEMAS.items(), found, strict=True):
        assert not calls
        if reason == "stop":
            ended += 1
            fault = _fault(schema, text)
            assert fault is None, (title, text, fault)
    print(f"{ended} of {len(SCHEMAS)} ended by themselves, and all match")
    assert ended > len(SCHEMAS) // 2


def test_what_is_called_is_given_and_matches(engine: Engine, tiny: LoadedModel) -> None:
    # What refers to its own root, or names a draft, cannot stand inside of another schema.
    parameters = [
        _parameters(schema)
        for schema in SCHEMAS.values()
        if not any(f'"{key}"' in json.dumps(schema) for key in ("$ref", "$schema"))
    ]
    pairs = list(zip(parameters, parameters[1:] + parameters[:1], strict=True))
    shapes = [
        Shape(functions=(Function("one", one), Function("other", other)), choice="required")
        for one, other in pairs
    ]
    found = run(engine, tiny, shapes)
    whole = 0
    for (one, other), (reason, text, calls) in zip(pairs, found, strict=True):
        assert text == "", "nothing but calls"
        for name, arguments in calls if reason == "tool_calls" else calls[:-1]:
            whole += 1
            schema = {"one": one, "other": other}[name]
            fault = _fault(schema, arguments)
            assert fault is None, (schema, arguments, fault)
    print(f"{whole} whole calls in {len(shapes)} completions, and all match")
    assert whole > len(shapes) // 2


def _fault(schema: Any, text: str) -> object:
    draft = validator_for(schema, default=Draft202012Validator)
    validator = extend(draft, {"multipleOf": _multiple_of})(schema)
    return next(validator.iter_errors(json.loads(text)), None)


def _multiple_of(validator: Any, divisor: Any, value: Any, schema: Any) -> Iterator[Any]:
    """In decimals: the library divides floats, where 1.16 is no multiple of 0.01."""
    if validator.is_type(value, "number") and Fraction(str(value)) % Fraction(str(divisor)):
        yield ValidationError(f"{value} is not a multiple of {divisor}")


def _parameters(schema: Any) -> dict[str, Any]:
    if isinstance(schema, dict) and schema.get("type") == "object":
        return schema
    return {"type": "object", "properties": {"value": schema}, "required": ["value"]}
