"""Plans: pure, deterministic, lazy; every example job plans."""

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ParameterError, SpecError
from orchestrator.spec import plan as planning
from orchestrator.spec.job import parse_job, read_job
from orchestrator.spec.plan import Plan, plan, resolve
from orchestrator.spec.templates import TemplateError

JOBS = Path(__file__).parents[3] / "jobs"


def made(root: Path = Path(), **keys: Any) -> Plan:
    """The plan of a job given as values: JSON is YAML."""
    job = {
        "name": "a",
        "model": "tiny",
        "params": {"messages": [{"role": "user", "content": "Hi"}]},
        **keys,
    }
    return plan(parse_job(json.dumps(job), file="x.yaml", root=root))


def points(**keys: Any) -> list[Any]:
    return [point.params for point in made(**keys).points]


@pytest.mark.parametrize("file", sorted(JOBS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_example_plans_and_resolves(file: Path) -> None:
    found = plan(read_job(file))
    assert found.n_requests > 0
    assert found.spec.name == file.stem
    for request in found.requests():
        params = resolve(
            found.spec.params, request.point.params, request.item.columns, request.seed
        )
        assert (params.n, params.max_tokens, params.seed) == (
            request.n, request.max_tokens, request.seed,
        )  # fmt: skip


def test_quickstart_is_small() -> None:
    found = plan(read_job(JOBS / "quickstart.yaml"))
    assert found.n_items >= 20
    assert found.n_requests <= 250
    assert found.max_total_tokens is not None


def test_points_come_in_the_file_s_order_the_last_fastest() -> None:
    assert points() == [{}]
    assert points(sweep={"temperature": [1, 0], "n": [2, 1]}) == [
        {"temperature": 1, "n": 2}, {"temperature": 1, "n": 1},
        {"temperature": 0, "n": 2}, {"temperature": 0, "n": 1},
    ]  # fmt: skip


def test_include_and_exclude() -> None:
    sweep: dict[str, Any] = {
        "seed": [1, 2, 3],
        "temperature": [0, 0.5],
        "exclude": [{"temperature": 0.0, "seed": [2, 3]}, {"seed": 3}],
        "include": [{"top_p": 0.5}, {"temperature": 0, "seed": 3}],
    }
    assert points(sweep=sweep) == [
        {"seed": 1, "temperature": 0}, {"seed": 1, "temperature": 0.5},
        {"seed": 2, "temperature": 0.5}, {"top_p": 0.5}, {"temperature": 0, "seed": 3},
    ]  # fmt: skip
    assert points(sweep={"include": [{"n": 2}, {"n": 3}]}) == [{"n": 2}, {"n": 3}]


def test_true_is_not_one() -> None:
    assert points(sweep={"logprobs": [True, False], "exclude": [{"logprobs": True}]}) == [
        {"logprobs": False}
    ]
    with pytest.raises(SpecError, match=r"a value of 'sweep\.logprobs'"):
        points(sweep={"logprobs": [True, False], "exclude": [{"logprobs": 1}]})


def test_positions_numbers_and_bounds() -> None:
    found = made(
        dataset={"items": [{"a": 1}, {"a": 2}, {"a": 3}]},
        params={"messages": [{"role": "user", "content": "{{ a }}"}], "max_tokens": 10},
        sweep={"n": [1, 3], "include": [{"max_tokens": 7, "n": None}]},
    )
    requests = list(found.requests())
    assert [request.position for request in requests] == list(range(9))
    assert [(r.item.position, r.point.position) for r in requests] == list(
        itertools.product(range(3), range(3))
    )
    assert [(r.n, r.max_tokens) for r in requests[:3]] == [(1, 10), (3, 10), (1, 7)]
    assert (found.n_items, found.n_requests, found.n_choices) == (3, 9, 15)
    assert (
        found.max_total_tokens
        == 3 * (10 + 30 + 7)
        == sum(r.n * (r.max_tokens or 0) for r in requests)
    )
    assert [item.custom_id for item in found.items()] == ["0", "1", "2"]


def test_no_bound_without_max_tokens() -> None:
    assert made().max_total_tokens is None
    assert made(sweep={"max_tokens": [1, None]}).max_total_tokens is None
    assert made(sweep={"max_tokens": [1, 2]}).max_total_tokens == 3


def test_limit_is_kept_to_the_token() -> None:
    sweep = {"max_tokens": [50, 25]}
    assert made(sweep=sweep, limits={"max_total_tokens": 75}).max_total_tokens == 75
    with pytest.raises(SpecError, match="expected a job of at most 74 tokens, got up to 75 in 2"):
        made(sweep=sweep, limits={"max_total_tokens": 74})
    with pytest.raises(SpecError, match=r"'params.max_tokens' beside it"):
        made(sweep={"max_tokens": [1, None]}, limits={"max_total_tokens": 74})


def test_seeds() -> None:
    assert [r.seed for r in made(sweep={"seed": [7, -7]}).requests()] == [7, -7]
    job: dict[str, Any] = {
        "dataset": {"items": [{"a": 1}, {"a": 2}]},
        "sweep": {"temperature": [0, 1], "include": [{"seed": 5}]},
    }
    seeds = [request.seed for request in made(**job).requests()]
    assert seeds == [
        3882903725285577553, 8310537418779283212, 5,
        1487206122617792997, 78332280387027667, 5,
    ]  # fmt: skip
    assert all(0 <= seed < 2**63 for seed in seeds)
    others = [request.seed for request in made(**job, seed=1).requests()]
    assert len({*seeds, *others}) == 9


def test_resolve_puts_the_point_over_the_job_and_renders() -> None:
    params = {
        "model": "tiny", "temperature": 0.5, "stop": ["{{ a }}", "x"], "max_tokens": 3,
        "messages": [{"role": "user", "name": "n{{ a }}", "content": "{{ a }}"}],
    }  # fmt: skip
    found = resolve(params, {"temperature": 1, "max_tokens": None}, {"a": 7}, 9)
    assert found.messages == ({"role": "user", "name": "n7", "content": "7"},)
    assert (found.stop, found.temperature, found.max_tokens, found.seed) == (("7", "x"), 1, None, 9)
    assert resolve(params, {"stop": "{{ a }}!"}, {"a": 7}, 9).stop == ("7!",)
    assert params["stop"] == ["{{ a }}", "x"]
    with pytest.raises(TemplateError):
        resolve(params, {}, {}, 9)
    with pytest.raises(ParameterError):
        resolve(params, {"logit_bias": {"10": 1}}, {"a": 7}, 9, vocab_size=10)


def test_each_item_is_rendered_at_every_point_that_renders_otherwise() -> None:
    items = {"items": [{"a": "x", "b": "y"}, {"a": "x"}]}
    with pytest.raises(SpecError, match=r"sweep\.stop\[2\]: expected a column 'b'.*item 1"):
        made(dataset=items, sweep={"stop": [None, "{{ a }}", "{{ b }}"]})
    with pytest.raises(SpecError, match=r"sweep\.include\[0\]\.user: expected a column 'b'"):
        made(dataset=items, sweep={"n": [1, 2], "include": [{"user": "{{ b }}"}]})
    params = {"messages": [{"role": "user", "content": "Hi"}], "stop": "{{ b }}"}
    with pytest.raises(SpecError, match=r"params\.stop: expected a column 'b'"):
        made(dataset=items, params=params, sweep={"stop": ["a"], "include": [{"n": 2}]})
    with pytest.raises(SpecError, match=r"sweep\.stop\[0\]: expected a string of at least 1"):
        made(dataset={"items": [{"a": ""}]}, sweep={"stop": ["{{ a }}"]})


def test_too_many_requests_are_noticed_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MAX_REQUESTS", 100)
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n' * 101 + "broken")
    with pytest.raises(SpecError, match=r"x\.yaml:1: dataset: expected at most 100 requests"):
        made(tmp_path, dataset={"path": "x.jsonl"})
    with pytest.raises(SpecError, match=r"sweep: expected at most 100 requests, got 60 points at"):
        made(dataset={"items": [{"a": 1}] * 2}, sweep={"seed": list(range(60))})


def test_too_many_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MAX_CHOICES", 100)
    assert made(sweep={"n": [100]}).n_choices == 100
    with pytest.raises(SpecError, match="expected at most 100 completions, got 101"):
        made(sweep={"n": [100, 1]})


def test_a_hundred_thousand_requests_are_not_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "x.jsonl").open("w") as stream:
        for number in range(20_000):
            stream.write(json.dumps({"a": number, "text": "x" * 100}) + "\n")
    spec = made(tmp_path, dataset={"path": "x.jsonl"}, sweep={"seed": [1, 2, 3, 4, 5]}).spec
    tracemalloc.start()
    found = plan(spec)
    count = sum(1 for _ in found.requests())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == found.n_requests == 100_000
    assert peak < 2_000_000, f"{peak} bytes"


numbers = st.integers(-5, 5)
sweeps = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.lists(numbers, min_size=1, max_size=4, unique=True),
        "temperature": st.lists(st.sampled_from([0, 0.5, 1, 2]), min_size=1, unique=True),
        "n": st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True),
        "stop": st.lists(st.sampled_from(["a", "{{ a }}x", None]), min_size=1, unique=True),
    },
)
columns = st.fixed_dictionaries({"a": st.one_of(numbers, st.text(max_size=5))})


@settings(max_examples=60, deadline=None, print_blob=True)
@given(sweep=sweeps, items=st.lists(columns, min_size=1, max_size=4), seed=numbers)
def test_planning_twice_gives_the_same_plan(
    sweep: dict[str, Any], items: list[dict[str, Any]], seed: int
) -> None:
    job: dict[str, Any] = {"dataset": {"items": items}, "seed": seed}
    if sweep:
        job["sweep"] = sweep
    try:
        first, second = made(**job), made(**job)
    except SpecError as error:  # a column of NUL characters or half surrogate pairs
        assert "NUL" in str(error) or "YAML" in str(error) or "UTF-8" in str(error)
        return
    requests = list(first.requests())
    assert first == second
    assert first.spec.digest == second.spec.digest
    assert requests == list(second.requests()) == list(first.requests())
    assert [request.position for request in requests] == list(range(first.n_requests))
    assert first.n_choices == sum(request.n for request in requests)
    assert len({str(point.params) for point in first.points}) == len(first.points)
