"""What only the model's files can tell of a plan: ids in range, prompts that fit, grammars made.

Refuses at the door what `admission` would let fail request by request. Needs how the model reads
and writes (`loading/wording.py`); knows nothing of sessions, devices or SQL.
"""

import json
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ParameterError, RequestError, SpecError
from orchestrator.spec import sweep
from orchestrator.spec.job import at_point
from orchestrator.spec.params import ChatParams
from orchestrator.spec.plan import Item, Plan, Point, resolve
from workers.loading.wording import Wording
from workers.shapes import asked, form

# Those of them that a sweep may vary.
_SHAPING = ("function_call", "parallel_tool_calls", "response_format", "tool_choice")


@dataclass(slots=True)
class _Kind:
    """Points whose requests look alike but for numbers; `most` is their largest `max_tokens`."""

    point: Point
    included: int | None
    tools: list[dict[str, Any]] | None = None
    most: int = 0


def check_plan(plan: Plan, wording: Wording, *, context: int) -> None:
    """Raises SpecError for what no worker with this model could do.

    That is a `logit_bias` beyond the vocabulary, a strict schema that cannot be enforced, tools
    without a known format of calls, a prompt beyond `context` tokens, the completion's counted
    with it. Messages are no sweep's parameter: each item is rendered and encoded once for each
    different set of tools, against the largest `max_tokens` of its points. Of a plan of bodies
    each is a request by itself: a ParameterError for the first that cannot be done.
    """
    if plan.verbatim:
        _check_bodies(plan, wording, context)
        return
    kinds = _kinds(plan)
    for item in plan.items():
        if item.position == 0:
            _check_bias(plan, item, wording.tokenizer.vocab_size)
            for kind in kinds:
                _check_form(plan, kind, item, wording)
            kinds = _by_tools(kinds)
        for kind in kinds:
            length = _length(plan, kind, item, wording)
            _check_length(plan, item, length, kind.most, context)


def _check_bodies(plan: Plan, wording: Wording, context: int) -> None:
    formed: set[str] = set()
    for item in plan.items():
        try:
            params = resolve({}, {}, item.columns, 0, verbatim=True)
            _check_body(params, item, wording, context, formed)
        except ParameterError as error:
            error.item = item.position
            raise error.at(_named(plan, item)) from error


def _check_body(
    params: ChatParams, item: Item, wording: Wording, context: int, formed: set[str]
) -> None:
    """`formed`: the shapes whose grammars are known to compile, as lines mostly share one."""
    _check_ids(params, wording.tokenizer.vocab_size)
    wishes = asked(params)
    names = (*_SHAPING, "functions", "tools")
    shape = json.dumps({name: item.columns[name] for name in names if name in item.columns})
    if shape not in formed:
        form(wishes, wording)
        formed.add(shape)
    try:
        length = _tokens(params, wishes.tools, wording)
    except RequestError as error:
        raise ParameterError(error.message, "messages", error.code) from error
    most = params.max_tokens or 0
    if length + max(most, 1) > context:
        raise _too_long(length, most, context)


def _kinds(plan: Plan) -> list[_Kind]:
    """One for each different set of the parameters that shape a completion."""
    kinds: dict[str, _Kind] = {}
    points = zip(plan.points, sweep.expand(plan.spec.sweep), strict=True)
    for point, (_, included) in points:
        key = sweep.same({name: point.params[name] for name in _SHAPING if name in point.params})
        kind = kinds.setdefault(key, _Kind(point, included))
        given = {**plan.spec.params, **point.params}.get("max_tokens")
        kind.most = max(kind.most, given if isinstance(given, int) else 0)
    return list(kinds.values())


def _by_tools(kinds: list[_Kind]) -> list[_Kind]:
    """Those of the same tools as one: their prompts are the same."""
    merged: dict[str, _Kind] = {}
    for kind in kinds:
        same = merged.setdefault(sweep.same({"tools": kind.tools}), kind)
        same.most = max(same.most, kind.most)
    return list(merged.values())


def _check_bias(plan: Plan, item: Item, vocab_size: int) -> None:
    for point in plan.points:
        try:
            _check_ids(resolve(plan.spec.params, point.params, item.columns, 0), vocab_size)
        except ParameterError as error:
            path = ("sweep",) if "logit_bias" in point.params else ("params", "logit_bias")
            raise error.at(plan.spec.document.where(*path)) from None


def _check_ids(params: ChatParams, vocab_size: int) -> None:
    bias = params.logit_bias
    if bias and (largest := max(bias)) >= vocab_size:
        raise ParameterError(
            f"Invalid key in 'logit_bias': {largest}. Maximum value is {vocab_size - 1}.",
            "logit_bias",
        )


def _check_form(plan: Plan, kind: _Kind, item: Item, wording: Wording) -> None:
    """None of these parameters is a template: one item stands for all."""
    wishes = asked(resolve(plan.spec.params, kind.point.params, item.columns, 0))
    kind.tools = wishes.tools
    try:
        form(wishes, wording)
    except ParameterError as error:
        spec = plan.spec
        raise at_point(
            spec.document, error, spec.sweep, kind.point.params, kind.included
        ) from error


def _length(plan: Plan, kind: _Kind, item: Item, wording: Wording) -> int:
    params = resolve(plan.spec.params, kind.point.params, item.columns, 0)
    try:
        return _tokens(params, kind.tools, wording)
    except RequestError as error:
        expected = "messages that the model's chat template takes"
        raise SpecError(_where(plan, item), expected, str(error)) from error


def _tokens(params: ChatParams, tools: list[dict[str, Any]] | None, wording: Wording) -> int:
    return len(wording.tokenizer.encode(wording.template.render(list(params.messages), tools)))


def _check_length(plan: Plan, item: Item, length: int, most: int, context: int) -> None:
    if length + max(most, 1) > context:
        raise _too_long(length, most, context).at(_where(plan, item))


def _too_long(length: int, most: int, context: int) -> ParameterError:
    return ParameterError(
        f"This model's maximum context length is {context} tokens. However, you requested "
        f"{length + most} tokens ({length} in the messages, {most} in the completion). "
        "Please reduce the length of the messages or completion.",
        "messages",
        "context_length_exceeded",
    )


def _where(plan: Plan, item: Item) -> str:
    place = plan.spec.document.where("params", "messages")
    return f"{place}: item {item.position} (custom_id {item.custom_id!r})"


def _named(plan: Plan, item: Item) -> str:
    return f"{plan.spec.document.file}: item {item.position} (custom_id {item.custom_id!r})"
