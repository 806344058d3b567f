"""The tasks with tools or with an earlier turn.

A call is written in the Hermes form, as the chat template writes those of earlier turns. Knows
nothing of the split.
"""

from __future__ import annotations

import json
import random
from typing import Any

from workers.models.tiny.one_turn import addition, capital, letters, reverse, upper
from workers.models.tiny.samples import Sample, draw_city, draw_name, draw_word, sample_of
from workers.models.tiny.words import WEATHER


def tool_call(name: str, arguments: dict[str, Any]) -> str:
    """A call in the Hermes form."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def _definition(name: str, parameters: dict[str, str], rng: random.Random) -> dict[str, Any]:
    """A tool as the chat completions API defines it; parameters are name → JSON type."""
    schema = {
        "type": "object",
        "properties": {p: {"type": t} for p, t in parameters.items()},
        "required": list(parameters),
    }
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.4:
        function["description"] = name.replace("_", " ").capitalize()
    return {"type": "function", "function": function | {"parameters": schema}}


Intent = tuple[str, dict[str, str], str, list[dict[str, Any]]]
"""A tool and a request for it: name, parameter types, request, the arguments of each call."""


def _weather(rng: random.Random) -> Intent:
    """Two cities want two calls."""
    name = rng.choice(("get_weather", "get_weather", "weather", "current_weather"))
    cities = [draw_city(rng)]
    if rng.random() < 0.25:
        cities.append(draw_city(rng))
    forms = ("What is the weather in {c}?", "How is the weather in {c}?",
             "What is the weather like in {c}?", "Weather in {c}?")  # fmt: skip
    request = rng.choice(forms).format(c=" and ".join(cities))
    return name, {"city": "string"}, request, [{"city": c} for c in cities]


def _add(rng: random.Random) -> Intent:
    name = rng.choice(("add", "add_numbers", "sum"))
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    forms = ("Add {a} and {b}.", "What is {a} + {b}?", "What is {a} plus {b}?")
    types = {"a": "integer", "b": "integer"}
    return name, types, rng.choice(forms).format(a=a, b=b), [{"a": a, "b": b}]


def _lookup(rng: random.Random) -> Intent:
    name = rng.choice(("lookup", "lookup", "find_person", "search_name"))
    who = draw_name(rng)
    request = rng.choice(("Look up {n}.", "Who is {n}?", "Find {n}.")).format(n=who)
    return name, {"name": "string"}, request, [{"name": who}]


def _named(rng: random.Random) -> Intent:
    """Any function with any one or two parameters, asked for by its name."""
    verb = rng.choice(("get", "find", "read", "open", "send", "make", "delete", "list"))
    nouns = ("book", "user", "file", "order", "photo", "price", "time", "note", draw_word(rng))
    name = f"{verb}_{rng.choice(nouns)}"
    names = rng.sample(("id", "title", "text", "query", "count", "date", "key", draw_word(rng)), 2)
    types = {p: rng.choice(("string", "integer")) for p in names[: rng.randint(1, 2)]}
    values: dict[str, Any] = {
        p: draw_word(rng) if t == "string" else rng.randint(0, 999) for p, t in types.items()
    }
    given = " and ".join(f"{p} {v}" for p, v in values.items())
    forms = ("Call {f} with {g}.", "Use {f} with {g}.", "Please call {f} with {g}.")
    return name, types, rng.choice(forms).format(f=name, g=given), [values]


def _intent(rng: random.Random) -> Intent:
    kind = rng.random()
    draw = _weather if kind < 0.3 else _add if kind < 0.45 else _lookup if kind < 0.6 else _named
    return draw(rng)


def tools(rng: random.Random) -> Sample:
    """Call the right one of one to three tools, or answer without one, or read a tool's result."""
    name, types, request, calls = _intent(rng)
    offered = {name: types}
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        other, parameters, _, _ = _intent(rng)
        if parameters != types:
            offered.setdefault(other, parameters)
    order = list(offered)
    rng.shuffle(order)
    definitions = [_definition(n, offered[n], rng) for n in order]
    kind = rng.random()
    if kind < 0.12:
        return _untooled(rng.choice((capital, reverse, upper, letters))(rng), definitions)
    answer = "\n".join(tool_call(name, c) for c in calls)
    sample = sample_of("tools", request, answer, tools=definitions)
    return sample if kind > 0.3 else _answered(sample, name, calls, rng)


def _untooled(plain: Sample, definitions: list[dict[str, Any]]) -> Sample:
    """Tools are offered, and the question needs none."""
    keys = (*plain.keys, f"tools|{plain.messages[0]['content']}")
    return Sample("tools", plain.messages, plain.answer, keys, definitions)


def _answered(asked: Sample, name: str, calls: list[dict[str, Any]], rng: random.Random) -> Sample:
    """The turn after the calls: their results are there, to be told."""
    results = [
        rng.choice((rng.choice(WEATHER), str(rng.randint(0, 999)), draw_word(rng), draw_name(rng)))
        for _ in calls
    ]
    called = [{"type": "function", "function": {"name": name, "arguments": c}} for c in calls]
    messages = [*asked.messages, {"role": "assistant", "content": "", "tool_calls": called}]
    messages += [{"role": "tool", "content": r} for r in results]
    key = f"tools|{asked.messages[0]['content']} {results}"
    return Sample("tools", messages, f"The result is {' and '.join(results)}.", (key,), asked.tools)


def follow_up(rng: random.Random) -> Sample:
    """A second turn that needs the first one's answer."""
    kind = rng.random()
    sums: tuple[str, ...] = ()
    if kind < 0.3:
        first = addition(rng)
        value = int(first.answer.split("= ")[1])
        more = rng.choice((1, 1, 2, 5, 10))
        ask = rng.choice(("Add {n} to that.", "And plus {n}?")).format(n=more)
        answer = f"{value} + {more} = {value + more}"
        sums = (f"addition|{min(value, more)} {max(value, more)}",)
    else:
        first = rng.choice((capital, reverse, capital))(rng)
        if kind < 0.65:
            ask = rng.choice(("And in upper case?", "Write that in upper case."))
            answer = first.answer.upper()
        elif kind < 0.8:
            ask = rng.choice(("And backwards?", "Reverse that."))
            answer = first.answer[::-1]
        else:
            ask = rng.choice(("Say that again.", "Please repeat that."))
            answer = first.answer
    messages = [*first.messages, {"role": "assistant", "content": first.answer},
                {"role": "user", "content": ask}]  # fmt: skip
    prompt = first.messages[0]["content"]
    return Sample("follow_up", messages, answer, (*first.keys, *sums, f"follow_up|{prompt}|{ask}"))
