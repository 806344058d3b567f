"""Shapes to grammars: what a completion must look like, in the model's own form of calls.

A `Shape` says what is wanted of content and calls, a `CallFormat` how the model writes calls,
`lark` how both are a grammar, `matching` which tokens it allows. Knows nothing of requests,
sampling or chat.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from workers.grammars import lark
from workers.grammars.matching import Grammar as Grammar
from workers.grammars.matching import Mask as Mask
from workers.grammars.matching import Matcher as Matcher
from workers.grammars.matching import Vocabulary
from workers.grammars.opening import Openings
from workers.grammars.validity import Validity
from workers.words.calls import CallFormat
from workers.words.text import Call
from workers.words.tokenizer import Lead, Tokenizer

KEPT_GRAMMARS = 64


class GrammarError(ValueError):
    """A shape that cannot be kept to: `where` in the request, and the reason."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called; without `parameters` it has none."""

    name: str
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """What a completion must look like.

    `schema` of the content (None: free text) and whether it is `strict`; the `functions`;
    `choice`: `auto`, `required` or `named` (then there is exactly that one function);
    `parallel`: more than one call is allowed.
    """

    schema: Mapping[str, Any] | None = None
    strict: bool = False
    functions: tuple[Function, ...] = ()
    choice: str = "auto"
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Compiled:
    """A shape's grammar (None: anything goes), and what of the shape it cannot keep to.

    `calls`: the form to read the completion's calls by; None: it has none.
    """

    grammar: "Grammar | None" = None
    warnings: tuple[str, ...] = ()
    calls: CallFormat | None = None


class Grammars:
    """Shapes to grammars for one model. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, eos: frozenset[int]) -> None:
        self._tokenizer, self._eos = tokenizer, eos
        self._lock = threading.RLock()
        self._vocabularies: dict[tuple[tuple[int, bytes], ...], Vocabulary] = {}
        self._openings: dict[str, Openings] = {}
        self._compiled: OrderedDict[str, Compiled] = OrderedDict()

    def compile(self, shape: Shape, calls: CallFormat | None) -> Compiled:
        """The grammar of `shape`, with calls in the model's form.

        Raises GrammarError (`response_format`, `tools`, `tools[i].function.parameters`) if a
        strict schema cannot be kept to, or if functions are given and no form of calls.
        """
        key = _key(shape, calls)
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(shape, calls)
            self._compiled.move_to_end(key)
            while len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
            return self._compiled[key]

    def _compile(self, shape: Shape, form: CallFormat | None) -> Compiled:
        if shape.functions and form is None:
            raise GrammarError("tools", "the model has no known form of calls")
        form = form if shape.functions else None
        try:
            return self._made(shape, form, [])
        except ValueError:
            warnings: list[str] = []
            possible = self._possible(shape, warnings)
        try:
            return self._made(possible, form, warnings)
        except ValueError as error:
            raise GrammarError("tools" if form else "response_format", str(error)) from error

    def _possible(self, shape: Shape, warnings: list[str]) -> Shape:
        """`shape` without what cannot be kept to; GrammarError where that is strict."""
        content = shape.schema
        if content is not None and (reason := self._refusal(content)):
            content = None
            _give_up("response_format", "the content is free", shape.strict, reason, warnings)
        functions = []
        for i, each in enumerate(shape.functions):
            reason = _no_arguments(each) or self._refusal(each.parameters or {})
            if reason:
                where = f"tools[{i}].function.parameters"
                _give_up(where, "arguments are any object", each.strict, reason, warnings)
            functions.append(replace(each, parameters=lark.ANY_OBJECT) if reason else each)
        return replace(shape, schema=content, functions=tuple(functions))

    def _refusal(self, schema: Mapping[str, Any]) -> str | None:
        """Why `schema` alone has no grammar."""
        try:
            Validity(schema)
            self._vocabulary({}).compile(lark.grammar(schema, None, (), False, False))
        except ValueError as error:
            return str(error)
        return None

    def _made(self, shape: Shape, form: CallFormat | None, warnings: list[str]) -> Compiled:
        """ValueError if there is no grammar of it."""
        forced = shape.functions and shape.choice != "auto"
        content = None if forced else shape.schema
        if content is None and form is None:
            return Compiled(None, tuple(warnings))
        if content is not None and form is not None:
            form = form.made_exclusive()
        functions = [(f.name, lark.arguments_schema(f.parameters)) for f in shape.functions]
        checks = _Checks(
            None if content is None else Validity(content),
            {name: Validity(schema) for name, schema in functions},
            shape,
        )
        spaced = self._tokenizer.lead != Lead()
        text = lark.grammar(content, form, functions, shape.parallel, spaced)
        vocabulary = self._vocabulary(form.spelled(self._tokenizer) if form else {})
        lazy = form is not None and content is None and shape.choice == "auto"
        openings = self._openings_of(form) if form and lazy else None
        grammar = Grammar(vocabulary, vocabulary.compile(text), checks.fault, openings)
        return Compiled(grammar, tuple(warnings), form)

    def _vocabulary(self, spelled: Mapping[int, bytes]) -> Vocabulary:
        silent = {id: data for id, data in spelled.items() if self._tokenizer.is_special(id)}
        key = tuple(sorted(silent.items()))
        if key not in self._vocabularies:
            self._vocabularies[key] = Vocabulary(self._tokenizer, self._eos, silent)
        return self._vocabularies[key]

    def _openings_of(self, form: CallFormat) -> Openings:
        if form.name not in self._openings:
            tokens = self._vocabulary(form.spelled(self._tokenizer)).tokens
            self._openings[form.name] = Openings(tokens, self._tokenizer.lead, *form.openings)
        return self._openings[form.name]


def _key(shape: Shape, calls: CallFormat | None) -> str:
    functions = [[each.name, each.parameters, each.strict] for each in shape.functions]
    facts = [shape.schema, shape.strict, functions, shape.choice, shape.parallel]
    try:
        return json.dumps([*facts, calls and calls.name])
    except RecursionError as error:
        where = "tools" if shape.functions else "response_format"
        raise GrammarError(where, "a schema is nested too deeply") from error


def _no_arguments(function: Function) -> str | None:
    try:
        lark.arguments_schema(function.parameters)
    except ValueError as error:
        return str(error)
    return None


def _give_up(where: str, instead: str, strict: bool, reason: str, warnings: list[str]) -> None:
    if strict:
        raise GrammarError(where, reason)
    warnings.append(f"{where}: this schema is not enforced, {instead}: {reason}")


@dataclass(frozen=True, slots=True)
class _Checks:
    """What a finished completion must be."""

    content: Validity | None
    functions: Mapping[str, Validity]
    shape: Shape

    def fault(self, text: str, calls: Sequence[Call]) -> str | None:
        if calls or (self.functions and self.shape.choice != "auto"):
            return self._fault_of_calls(calls)
        found = self.content.fault(text) if self.content else None
        return found and f"the content does not match the schema: {found}"

    def _fault_of_calls(self, calls: Sequence[Call]) -> str | None:
        if not calls or (len(calls) > 1 and not self.shape.parallel):
            return f"{len(calls)} calls were made"
        for call in calls:
            function = self.functions.get(call.name)
            if function is None:
                return f"a call of {call.name!r}, which is none of the functions"
            found = function.fault(call.arguments)
            if found:
                return f"the arguments of {call.name} do not match the schema: {found}"
        return None
