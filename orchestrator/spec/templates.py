"""Templates over an item's columns: a small, sandboxed, deterministic part of Jinja2.

Expressions, filters, `if` and `for` over columns; no assignment, macro, include or global, so a
rendering cannot grow or run without bound, and yields the same text every time. Prints objects,
lists and booleans as JSON; a missing or null value is an error, never an empty string.
Knows nothing of which parameter a text belongs to but the path it is told.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orchestrator.errors import RequestError
from orchestrator.spec.refusals import KeyPath, dotted

MAX_OUTPUT = 2**20
MAX_NUMBER = 10**30
MAX_LOOP_DEPTH = 2
MAX_INDENT = 16
TEMPLATED = ("messages", "stop", "user")  # the parameters whose texts are templates

_FILTERS = frozenset(
    ("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items",
     "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse",
     "select", "selectattr", "sort", "string", "sum", "title", "trim", "truncate",
     "unique", "upper", "urlencode", "wordcount")
)  # fmt: skip
_METHODS = frozenset(
    ("capitalize", "casefold", "count", "endswith", "find", "get", "index", "isalnum", "isalpha",
     "isdigit", "islower", "isupper", "items", "keys", "lower", "lstrip", "removeprefix",
     "removesuffix", "rfind", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
     "title", "upper", "values")
)  # fmt: skip
_NODES = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Name, nodes.Const,
    nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr, nodes.Filter,
    nodes.Test, nodes.Call, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Compare,
    nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Pos, nodes.Add, nodes.Sub,
    nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Concat,
)  # fmt: skip


class TemplateError(RequestError):
    """A text that cannot be rendered for this item; `column` is the one that is missing."""

    def __init__(self, path: KeyPath, reason: str, column: str | None = None) -> None:
        super().__init__("template_error", f"{dotted(path)}: {reason}" if path else reason)
        self.path, self.reason, self.column = path, reason, column


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with only the listed methods, and arithmetic on numbers of bounded size."""

    intercepted_binops = frozenset({"+", "*", "%", "/", "//", "-"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        known = not callable(value) or attr in _METHODS or type(obj).__name__ == "LoopContext"
        return known and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No text's `format` is special here: like every method not listed, it is refused."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for operand in (left, right):
            if isinstance(operand, StrictUndefined):
                str(operand)  # raises, naming the column
            if operator != "+" and not isinstance(operand, int | float):
                raise SecurityError(f"{operator!r} works on numbers only")
            if isinstance(operand, int | float) and abs(operand) > MAX_NUMBER:
                raise SecurityError(f"a number beyond {MAX_NUMBER:.0e}")
        return super().call_binop(context, operator, left, right)


def _json(value: object, indent: int | None = None) -> str:
    if indent and indent > MAX_INDENT:
        raise SecurityError(f"an indent of more than {MAX_INDENT}")
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


def _printed(value: object) -> object:
    if value is None:
        raise SecurityError("a null value; write {{ x | default('...', true) }} to print a text")
    return _json(value) if isinstance(value, bool | list | tuple | dict) else value


def _replace(value: object, old: str, new: str) -> str:
    text = str(value)
    if len(text) + text.count(old) * len(new) > MAX_OUTPUT:
        raise SecurityError(f"a text of more than {MAX_OUTPUT} characters")
    return text.replace(old, new)


def _join(value: Any, separator: str = "", attribute: str | None = None) -> str:
    each = [item[attribute] if attribute else item for item in value]
    if len(each) * len(separator) > MAX_OUTPUT:
        raise SecurityError(f"a text of more than {MAX_OUTPUT} characters")
    return separator.join(str(_printed(item)) for item in each)


def _round(value: float, digits: int = 0) -> float:
    return round(float(value), digits)


def _environment() -> _Environment:
    environment = _Environment(
        undefined=StrictUndefined, finalize=_printed, keep_trailing_newline=True, autoescape=False
    )
    environment.globals.clear()
    kept: dict[str, Callable[..., Any]] = {name: environment.filters[name] for name in _FILTERS}
    environment.filters = kept | {
        "tojson": _json,
        "replace": _replace,
        "join": _join,
        "round": _round,
    }
    return environment


_ENVIRONMENT = _environment()


def is_template(value: object) -> bool:
    """Whether Jinja2 would do anything with this value."""
    return isinstance(value, str) and any(mark in value for mark in ("{{", "{%", "{#"))


def strings(value: object, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Every template inside a tree of plain values, with its path."""
    if isinstance(value, str):
        if is_template(value):
            yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            yield from strings(inner, (*path, position))


def check(text: str) -> None:
    """Raise `TemplateError` if `text` is no template that could be rendered."""
    _compiled(text)


@lru_cache(maxsize=1024)
def _compiled(text: str) -> tuple[Any, frozenset[str]]:
    try:
        tree = _ENVIRONMENT.parse(text)
        _allow(tree)
        return _ENVIRONMENT.from_string(tree), frozenset(meta.find_undeclared_variables(tree))
    except TemplateSyntaxError as error:
        raise TemplateError(
            (), f"{str(error.message).rstrip('.')} (line {error.lineno} of the text)"
        ) from None
    except RecursionError:
        raise TemplateError((), "it is nested too deeply") from None


def _allow(tree: nodes.Template) -> None:
    for node in tree.find_all(nodes.Node):
        if not isinstance(node, (*_NODES, nodes.Helper)) or isinstance(node, nodes.Pow):
            _refuse(node, f"'{type(node).__name__.lower()}' is not allowed")
        if isinstance(node, nodes.Name) and node.name == "self":
            _refuse(node, "'self' is not allowed")
        if isinstance(node, nodes.Call) and not isinstance(node.node, nodes.Getattr):
            _refuse(node, "functions are not allowed")
        if isinstance(node, nodes.For) and _depth(node) > MAX_LOOP_DEPTH:
            _refuse(node, f"loops nested deeper than {MAX_LOOP_DEPTH} are not allowed")
        if isinstance(node, nodes.For) and node.recursive:
            _refuse(node, "recursive loops are not allowed")


def _depth(loop: nodes.For) -> int:
    return 1 + max((_depth(inner) for inner in loop.find_all(nodes.For)), default=0)


def _refuse(node: nodes.Node, reason: str) -> NoReturn:
    raise TemplateSyntaxError(reason, node.lineno)


def render(text: str, columns: Mapping[str, object], path: KeyPath = ()) -> str:
    """`text` over one item's columns; at most `MAX_OUTPUT` characters.

    Raises `TemplateError` (a `RequestError`) naming `path`.
    """
    if not is_template(text):
        return text
    template, used = _compiled(text)
    pieces, size = [], 0
    try:
        for piece in template.generate(columns):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT:
                raise TemplateError(path, f"a text of more than {MAX_OUTPUT} characters")
    except UndefinedError as error:
        absent = sorted(used - columns.keys())
        raise TemplateError(path, str(error), absent[0] if absent else None) from None
    except TemplateError:
        raise
    except Exception as error:  # a filter or an operator on a value it cannot take
        raise TemplateError(path, str(error).rstrip(".") or type(error).__name__) from None
    return "".join(pieces)


def render_tree(value: object, columns: Mapping[str, object], path: KeyPath = ()) -> Any:
    """A tree of plain values with every text in it rendered; keys are left alone."""
    if isinstance(value, str):
        return render(value, columns, path)
    if isinstance(value, Mapping):
        return {key: render_tree(inner, columns, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [render_tree(inner, columns, (*path, i)) for i, inner in enumerate(value)]
    return value


def outline(value: object) -> Any:
    """The tree with a plain word for every template, so that its shape can be checked early.

    Roles and types are no place for a template: they stay as they are, and are refused.
    """
    if isinstance(value, Mapping):
        fixed = ("role", "type")
        return {key: inner if key in fixed else outline(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [outline(inner) for inner in value]
    return "template" if is_template(value) else value
