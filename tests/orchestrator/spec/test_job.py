"""A job's YAML to its spec: what is read, where, and what tells one job from another."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.job import GraderSpec, JobSpec, Limits, parse_job
from orchestrator.spec.plan import plan
from orchestrator.spec.sweep import Sweep

HEAD = "name: a\nmodel: tiny\n"
PARAMS = "params: {messages: [{role: user, content: Hi}]}\n"


def parse(text: str, root: Path = Path()) -> JobSpec:
    return parse_job(text, file="jobs/x.yaml", root=root)


def test_the_least() -> None:
    spec = parse(HEAD + PARAMS)
    assert (spec.name, spec.model, spec.seed, spec.priority) == ("a", "tiny", 0, 0)
    assert spec.params == {"messages": [{"role": "user", "content": "Hi"}], "model": "tiny"}
    assert (spec.sweep, spec.graders, spec.limits) == (Sweep(), (), Limits())
    assert spec.source == HEAD + PARAMS


def test_everything(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.jsonl").write_text('{"q": "Hi"}\n')
    text = """\
name: a.b_c-1
seed: -5
priority: 7
dataset: {path: data/x.jsonl}
params:
  model: tiny
  messages: [{role: user, content: "{{ q }}"}]
  max_tokens: 8
sweep:
  n: [1, 2]
  stop: [[a, b], null, "c"]
  include: [{n: 3}]
  exclude: [{n: 1, stop: [[a, b], c]}, {n: 2, stop: null}]
graders:
  - {name: right, type: regex, expected: "^{{ q }}$", ignore_case: true, strip: true}
limits: {max_total_tokens: 1000}
"""
    spec = parse(text, tmp_path)
    assert (spec.name, spec.model, spec.seed, spec.priority) == ("a.b_c-1", "tiny", -5, 7)
    assert spec.graders == (GraderSpec("right", "regex", "^{{ q }}$", True, True),)
    assert spec.limits == Limits(1000)
    assert spec.sweep.lists == {"n": (1, 2), "stop": (["a", "b"], None, "c")}
    assert spec.dataset.path == "jobs/data/x.jsonl"
    assert spec.to_json()["dataset"] == {
        "path": "jobs/data/x.jsonl", "sha256": spec.dataset.sha256,
    }  # fmt: skip


def test_the_model_may_stand_at_both_places_if_it_is_the_same() -> None:
    params = "params: {model: tiny, messages: [{role: user, content: Hi}]}\n"
    assert parse(HEAD + params).model == parse("name: a\n" + params).model == "tiny"


def test_layout_and_comments_do_not_change_the_digest() -> None:
    other = """
# the same
params:
  messages:
    - content: "Hi"
      role: 'user'
model: "tiny"
seed: 0
name: a
"""
    assert parse(other).digest == parse(HEAD + PARAMS).digest


@pytest.mark.parametrize(
    "more",
    ["seed: 1\n", "priority: 1\n", "sweep: {seed: [1, 2]}\n", "sweep: {seed: [2, 1]}\n",
     "dataset: {items: [{a: 1}]}\n", "dataset: {items: [{a: 2}]}\n",
     "graders: [{name: x, type: equals, expected: a}]\n",
     "sweep: {seed: [1], n: [1]}\n", "sweep: {n: [1], seed: [1]}\n"],
)  # fmt: skip
def test_content_changes_the_digest(more: str) -> None:
    others = [HEAD + PARAMS, HEAD + PARAMS + "seed: 2\n"]
    assert parse(HEAD + PARAMS + more).digest not in [parse(other).digest for other in others]


@pytest.mark.parametrize("place", ["response_format", "tools", "functions", "sweep"])
def test_order_inside_a_schema_changes_the_digest_as_it_changes_the_answer(place: str) -> None:
    digests = set()
    for names in ("ab", "ba"):
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        function = {"name": "f", "parameters": schema}
        value: Any = {
            "response_format": shape, "tools": [{"type": "function", "function": function}],
            "functions": [function], "sweep": {"response_format": [shape]},
        }[place]  # fmt: skip
        job = {"name": "j", "model": "tiny", "params": {"messages": [
            {"role": "user", "content": "Hi"}]}}  # fmt: skip
        (job if place == "sweep" else job["params"])[place] = value  # type: ignore[index]
        digests.add(parse(json.dumps(job)).digest)
    assert len(digests) == 2


def test_order_of_a_sweep_changes_the_digest() -> None:
    texts = ["sweep: {seed: [1, 2]}\n", "sweep: {seed: [2, 1]}\n",
             "sweep: {seed: [1], n: [1]}\n", "sweep: {n: [1], seed: [1]}\n"]  # fmt: skip
    assert len({parse(HEAD + PARAMS + text).digest for text in texts}) == 4


def test_the_dataset_s_bytes_change_the_digest(tmp_path: Path) -> None:
    text = HEAD + PARAMS + "dataset: {path: x.jsonl}\n"
    (tmp_path / "x.jsonl").write_text('{"q": 1}\n')
    before = parse(text, tmp_path).digest
    assert parse(text, tmp_path).digest == before
    (tmp_path / "x.jsonl").write_text('{"q": 2}\n')
    assert parse(text, tmp_path).digest != before


def test_links_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"q": 1}\n')
    root = tmp_path / "jobs"
    root.mkdir()
    (root / "in.jsonl").write_text('{"q": 1}\n')
    (root / "out.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (root / "link.jsonl").symlink_to(root / "in.jsonl")
    (root / "folder").symlink_to(tmp_path)
    text = HEAD + PARAMS + "dataset: {path: PATH}\n"
    assert parse(text.replace("PATH", "link.jsonl"), root).dataset.sha256
    for path in ("out.jsonl", "folder/secret.jsonl"):
        with pytest.raises(SpecError, match="a link that leads out of it"):
            parse(text.replace("PATH", path), root)


def test_a_folder_that_is_itself_a_link_is_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/x.jsonl").write_text('{"q": 1}\n')
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert parse(HEAD + PARAMS + "dataset: {path: x.jsonl}\n", tmp_path / "link").dataset.file


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_file_cut_anywhere_is_refused_or_read(cut: int) -> None:
    """No beginning of a file, and no file with a hole, makes the reader itself fail."""
    text = (Path(__file__).parents[3] / "jobs/quickstart.yaml").read_text()
    root = Path(__file__).parents[3] / "jobs"
    third = len(text) * cut // 20
    for part in (text[:third], text[third:], text[:third] + text[third + 30 :]):
        try:
            parse(part, root)
        except SpecError as error:
            assert str(error).startswith("jobs/x.yaml")


def test_unknown_parameter_names_the_allowed_and_the_nearest() -> None:
    with pytest.raises(SpecError) as error:
        parse(HEAD + "params: {messages: [{role: user, content: Hi}], max_token: 1}\n")
    assert "max_tokens, messages" in error.value.expected
    assert error.value.got == "'max_token' (did you mean 'max_tokens'?)"


def test_any_value_anywhere_is_refused_or_read() -> None:
    """A value of any kind at any key: a refusal with a place, or a job; nothing worse."""
    values = ["x", "1", "-1", "1.5", "true", "null", "[]", "{}", "[1]", "[[]]", "{a: 1}", "''",
              "[{}]", "'{{ a }}'", "'{{'", "[null]"]  # fmt: skip
    keys = ["name", "model", "dataset", "params", "sweep", "graders", "limits", "seed",
            "priority", "jobs"]  # fmt: skip
    inner = ["path", "items", "messages", "stop", "temperature", "logit_bias", "include",
             "exclude", "seed", "max_total_tokens", "name", "response_format", "tools"]  # fmt: skip
    for value in values:
        for key in keys:
            _read_or_refuse({key: value})
            for each in inner:
                _read_or_refuse({key: f"{{{each}: {value}}}"})
                _read_or_refuse({key: f"[{{{each}: {value}}}]"})


def _read_or_refuse(change: dict[str, str]) -> None:
    top = {"name": "a", "model": "tiny", "params": PARAMS.removeprefix("params: ").strip()}
    try:
        parse("".join(f"{key}: {value}\n" for key, value in {**top, **change}.items()))
    except SpecError as error:
        assert error.where.startswith("jobs/x.yaml:")
        assert error.expected
        assert error.got


@pytest.mark.parametrize("content", ["As {{ form }}", "As JSON: {{ form }}", "As json"])
def test_the_word_json_may_come_with_the_item(content: str) -> None:
    job = {
        "name": "j", "model": "tiny", "dataset": {"items": [{"form": "Json"}]},
        "params": {"messages": [{"role": "user", "content": content}],
                   "response_format": {"type": "json_object"}},
    }  # fmt: skip
    spec = parse_job(json.dumps(job), file="j.yaml", root=Path())
    assert plan(spec).n_requests == 1
