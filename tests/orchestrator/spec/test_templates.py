"""Templates: what they print, what they refuse, and that none of them can run away."""

import time

import pytest

from orchestrator.spec import templates
from orchestrator.spec.templates import TemplateError, render, render_tree

COLUMNS = {
    "a": 12, "word": "planet", "flag": True, "none": None, "x": 0.5, "html": "<b> & 'c'",
    "list": [1, "é", None], "object": {"k": "v", "items": 3}, "people": [{"n": "Ada"}, {"n": "Bo"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("plain", "plain"), ("{ not } {one", "{ not } {one"), ("What is {{ a }}?", "What is 12?"),
        ("{{ a + 30 }} {{ a / 8 }} {{ a // 5 }} {{ a % 5 }} {{ -a }}", "42 1.5 2 2 -12"),
        ("{{ word | upper }} {{ word | length }} {{ word[::-1] }}", "PLANET 6 tenalp"),
        ("{{ word.title() }} {{ word.replace }}", None), ("{{ word.title() }}", "Planet"),
        ("{{ flag }} {{ list }} {{ object }}", 'true [1, "é", null] {"k": "v", "items": 3}'),
        ("{{ html }}", "<b> & 'c'"), ("{{ html | tojson }}", "\"<b> & 'c'\""),
        ("{{ object.k }} {{ object['k'] }} {{ people[1].n }}", "v v Bo"),
        ("{% for p in people %}{{ loop.index }}={{ p.n }};{% endfor %}", "1=Ada;2=Bo;"),
        ("{% if a > 10 %}big{% else %}small{% endif %}", "big"),
        ("{{ 'big' if a > 100 else 'small' }}", "small"),
        ("{{ none | default('-', true) }}{{ gone | default('?') }}", "-?"),
        ("{% if gone is defined %}x{% endif %}", ""),
        ("{{ people | map(attribute='n') | join(', ') }}", "Ada, Bo"),
        ("{{ word ~ a }}", "planet12"), ("{{ word + '!' }}", "planet!"),
        ("{% raw %}{{ a }}{% endraw %}", "{{ a }}"), ("{# gone #}x\n", "x\n"),
        ("{{ x | round }} {{ 2.345 | round(2) }}", "0.0 2.35"),
        ("{{ word | replace('plan', 'com') }}", "comet"), ("{{ {'é': 1} | tojson(indent=2) }}",
        '{\n  "é": 1\n}'),
    ],
)  # fmt: skip
def test_renders(text: str, rendered: str | None) -> None:
    if rendered is None:
        with pytest.raises(TemplateError):
            render(text, COLUMNS)
    else:
        assert render(text, COLUMNS) == rendered


def test_the_missing_column_is_named() -> None:
    with pytest.raises(TemplateError) as error:
        render("{{ a }} {{ sum }}", COLUMNS, ("messages", 0, "content"))
    assert (error.value.column, error.value.path) == ("sum", ("messages", 0, "content"))
    assert str(error.value) == "messages[0].content: 'sum' is undefined"
    with pytest.raises(TemplateError) as error:
        render("{{ object.gone }}", COLUMNS)
    assert error.value.column is None
    assert "no attribute 'gone'" in error.value.reason


@pytest.mark.parametrize(
    "text",
    [
        "{{ none }}", "{{ gone }}", "{{ gone + 1 }}", "{{ gone * 2 }}", "{{ gone.x }}",
        "{% for x in gone %}{% endfor %}", "{% if gone %}x{% endif %}", "{{ a", "{% if a %}",
        "{% foo %}", "{{ a | foo }}", "{{ a is foo }}", "{{ 1 / 0 }}", "{{ [1] | sum(start='') }}",
        # nothing that reaches out, keeps state, or differs from one rendering to the next
        "{{ word.__class__.__mro__ }}", "{{ word['__class__'] }}", "{{ word | attr('upper') }}",
        "{{ self }}", "{{ self._TemplateReference__context }}", "{{ loop }}", "{{ config }}",
        "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}",
        "{% block x %}{% endblock %}", "{% macro f() %}{% endmacro %}", "{% set y = 1 %}",
        "{% call f() %}{% endcall %}", "{% filter upper %}x{% endfilter %}",
        "{% with y = 1 %}{% endwith %}", "{% autoescape true %}{% endautoescape %}",
        "{{ range(3) }}", "{{ dict(a=1) }}", "{{ namespace(x=1) }}", "{{ cycler(1) }}",
        "{{ lipsum() }}", "{{ list | random }}", "{{ 'abc' | shuffle }}", "{{ list.append(1) }}",
        "{{ word.format(1) }}", "{{ '%s' % word }}", "{{ '%s' | format(word) }}",
        "{{ word.encode() }}", "{{ object.update({}) }}", "{{ list.sort() }}",
        "{{ word | pprint }}",
        # nothing that grows without bound
        "{{ word * 1000000000 }}", "{{ 1000000000 * word }}", "{{ [0] * 1000000000 }}",
        "{{ 9 ** 9 ** 9 }}", "{{ 10000000000000000000000000000000 * 2 }}",
        "{{ word.ljust(1000000000) }}", "{{ word.zfill(1000000000) }}",
        "{{ word | center(1000000000) }}", "{{ word | indent(1000000000) }}",
        "{{ '%1000000000d' % a }}", "{{ '%1000000000d' | format(a) }}",
        "{{ list | tojson(indent=1000000000) }}", "{{ list | batch(1000000000, 0) }}",
        "{{ 1 | round(-1000000000) }}", "{{ 'x\t'.expandtabs(1000000000) }}",
        "{% for a in list %}" * 3 + "{% endfor %}" * 3, "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{0.__class__}'.format(1) }}", "{{ '{:>1000000000}'.format_map(object) }}",
        "{% for x in people recursive %}{{ loop(people) }}{% endfor %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    ],
    ids=lambda text: text[:50],
)  # fmt: skip
def test_refused_at_once(text: str) -> None:
    started = time.monotonic()
    if text == "{{ 1 | round(-1000000000) }}":
        assert render(text, COLUMNS) == "0.0"
    else:
        with pytest.raises(TemplateError):
            render(text, COLUMNS)
    assert time.monotonic() - started < 2


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_OUTPUT", 100)
    many = {"list": list(range(1000)), "long": "x" * 60}
    assert len(render("{{ long }}", many)) == 60
    for text in (
        "{{ long }}{{ long }}", "{% for x in list %}{{ x }}{% endfor %}",
        "{{ list | join(long) }}", "{{ long | replace('x', long) }}",
        "{{ long.replace('x', long) }}",
    ):  # fmt: skip
        with pytest.raises(TemplateError):
            render(text, many)


def test_trees_keep_their_shape() -> None:
    tree = [{"role": "user", "content": [{"type": "text", "text": "{{ a }}"}], "k": 1}, None, 2.5]
    assert render_tree(tree, COLUMNS) == [
        {"role": "user", "content": [{"type": "text", "text": "12"}], "k": 1}, None, 2.5,
    ]  # fmt: skip
    with pytest.raises(TemplateError, match=r"^messages\[0\]\.content\[0\]\.text: 'a' is undef"):
        render_tree(tree, {}, ("messages",))
    assert list(templates.strings(tree)) == [((0, "content", 0, "text"), "{{ a }}")]


def test_rendering_does_not_change_columns() -> None:
    columns = {"list": [3, 1, 2]}
    assert render("{{ list | sort }}", columns) == "[1, 2, 3]"
    assert columns == {"list": [3, 1, 2]}
