"""Random parameters, random logits, random kills: what is stored keeps the laws of the stream.

Real rows on SQLite, a real recorder, engine, tokenizer and grammars; only the model is a hash. A
kill is a process that is gone after any flush: whatever was not flushed is lost, and the next one
goes on from the rows.
"""

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from orchestrator.db import replay, store, views
from orchestrator.db.database import Database
from orchestrator.spec.chunks import ChoiceEnd, fold, stream, usage
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from tests.fake_runner import FakeRunner
from workers.admission import to_completion
from workers.engine.engine import Engine
from workers.folders.folder import TINY
from workers.loading.wording import Wording
from workers.recorder import Recorder

WORDING = Wording.load(TINY)
BEGINS_CALL = {str(token): 7 for token in WORDING.tokenizer.encode("<tool_call>")}
PERSON = {
    "type": "object",
    "properties": {
        "age": {"type": "integer"},
        "name": {"type": "string", "pattern": "^[a-zé]{0,9}$"},
    },
    "required": ["age", "name"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": PERSON, "strict": True}},
    {"type": "function", "function": {"name": "no_arguments"}},
]
FUNCTIONS = [tool["function"] | {"description": "old"} for tool in TOOLS[1:]]
SHAPES: list[dict[str, Any]] = [
    {},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
    {"tools": TOOLS, "logit_bias": BEGINS_CALL},
    {"tools": TOOLS, "tool_choice": "none", "logit_bias": BEGINS_CALL},
    {"tools": TOOLS, "tool_choice": "required"},
    {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"functions": FUNCTIONS, "logit_bias": BEGINS_CALL},
    {"functions": FUNCTIONS, "function_call": {"name": "no_arguments"}},
    {"tools": TOOLS, "response_format": {"type": "json_object"}},
]
PARAMS = st.builds(
    lambda *parts: {key: value for part in parts for key, value in part.items()},
    st.sampled_from(SHAPES),
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0, 0.7, 1.5, 2]),
            "max_tokens": st.integers(1, 60),
            "n": st.integers(1, 3),
        },
        optional={
            "top_p": st.sampled_from([0, 0.5, 1]),
            "frequency_penalty": st.sampled_from([-1, 1.5]),
            "presence_penalty": st.sampled_from([-1, 1.5]),
            "stop": st.lists(
                st.sampled_from(["e", "th", '"', "</", "a\n"]), min_size=1, max_size=3
            ),
            "stream_options": st.just({"include_usage": True}),
            "service_tier": st.just("auto"),
        },
    ),
    st.sampled_from([{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2}]),
)
PLACE = itertools.count()


@dataclass(frozen=True)
class Stop:
    """When a process is gone: after so many flushes of so many steps each."""

    flushes: int
    steps: int
    slots: int


STOPS = st.lists(
    st.builds(Stop, st.integers(1, 4), st.integers(1, 12), st.integers(1, 5)), max_size=2
)


@pytest.fixture(scope="module")
def place(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    file = tmp_path_factory.mktemp("laws") / "penstock.db"
    shutil.copy(sqlite_template, file)
    with Database.open(f"sqlite:///{file}") as opened:
        yield opened


def submit(db: Database, params: Mapping[str, Any]) -> str:
    asked = [{"role": "user", "content": "Say {{ a }} as JSON"}]
    text = json.dumps(
        {
            "name": f"laws{next(PLACE)}",
            "model": "tiny",
            "seed": 7,
            "dataset": {"items": [{"a": "one"}, {"a": "two"}]},
            "params": {"messages": asked, **params},
        }
    )
    return store.insert_job(db, plan(parse_job(text, file="laws.yaml", root=Path.cwd())))


def work(db: Database, job_id: str, stop: Stop | None) -> None:
    """One process's life: until the job is done, or until it is gone."""
    slots = stop.slots if stop else 4
    engine = Engine(FakeRunner(WORDING.tokenizer.vocab_size, slots, 512), WORDING.tokenizer,
                    WORDING.eos)  # fmt: skip
    recorder = Recorder(db, model="tiny", fingerprint="fp_x", lease_seconds=60, flush_seconds=0.01)
    for _ in range(stop.flushes) if stop else itertools.count():
        if engine.idle:
            claims = store.claim(
                db, model="tiny", worker_id="w", limit=50, lease_seconds=60, job_id=job_id
            )
            if not claims:
                return
            for claimed in claims:
                recorder.begin(claimed)
                engine.admit(to_completion(claimed, WORDING))
        for _ in range(stop.steps if stop else 10):
            if not engine.idle:
                recorder.record(engine.step())
        assert not recorder.flush()
    store.release_worker(db, "w")  # as the reconciler does when the lease is over


def chunk_objects(db: Database, result: views.Result) -> list[dict[str, Any]]:
    spent = result.usage
    assert spent is not None
    ends = [ChoiceEnd(c.choice, str(c.finish_reason)) for c in result.choices]
    return list(
        stream(
            replay.envelope(db, result.request_id),
            views.chunks_after(db, result.request_id),
            ends,
            usage(spent.prompt_tokens, spent.completion_tokens),
        )
    )


def without_ids(completion: dict[str, Any]) -> str:
    """A completion as text, without what names its job."""
    for choice in completion["choices"]:
        for call in choice["message"].get("tool_calls", ()):
            call["id"] = "call"
    return json.dumps({**completion, "id": "", "created": 0})


def check_stream(found: list[dict[str, Any]], result: views.Result, params: Any) -> None:
    """Sections 3.1 to 3.5 of the reference."""
    opened: list[int] = []
    calls: dict[int, int] = {}
    for chunk in found:
        assert ("usage" in chunk) == ("stream_options" in params)
        assert ("service_tier" in chunk) == ("service_tier" in params)
        for choice in chunk["choices"]:
            index, delta = choice["index"], choice["delta"]
            assert ("role" in delta) == (index not in opened)
            if index not in opened:
                assert index == len(opened)
                opened.append(index)
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == calls.get(index, 0)
                    calls[index] = call["index"] + 1
                assert call["index"] == calls[index] - 1
            assert not (delta.get("content") and calls.get(index))
    finishes = [c["index"] for chunk in found for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(finishes) == opened == list(range(len(result.choices)))
    if "stream_options" in params:
        last = found[-1]["usage"]
        tokens = sum(choice.n_tokens for choice in result.choices)
        assert last["completion_tokens"] == tokens and found[-1]["choices"] == []


def check_texts(
    db: Database, completion: dict[str, Any], result: views.Result, params: Any
) -> None:
    """Content is the decoded tokens less what a stop string cut; entries are of that content."""
    for choice, stored in zip(completion["choices"], result.choices, strict=True):
        message = choice["message"]
        content, called = message["content"] or "", message.keys() & {"tool_calls", "function_call"}
        assert stored.text == content == "".join(chunk.text for chunk in stored.chunks)
        ids = tokens(db, result.request_id, choice["index"])
        assert len(ids) == stored.n_tokens <= params["max_tokens"]
        decoded = WORDING.tokenizer.decode(ids)
        if _may_call(params) and "response_format" not in params:
            # A marker that closes nothing is no content, but where content is JSON.
            decoded = decoded.replace("</tool_call>", "")
        assert decoded.startswith(content)
        rest = decoded[len(content) :]
        if rest and not called and "stop" not in params:  # cut off before the name was whole
            assert rest.lstrip("\n").startswith("<tool_call>")
            assert choice["finish_reason"] == "length" and _may_call(params)
        if not called:
            assert not any(stop in content for stop in params.get("stop", ()))
        if choice["finish_reason"] == "length":
            assert len(ids) == params["max_tokens"]
        if called and not content:
            assert choice["logprobs"] is None
            continue
        assert (choice["logprobs"] is not None) == ("logprobs" in params)
        if "logprobs" in params and "\N{REPLACEMENT CHARACTER}" not in content:
            entries = choice["logprobs"]["content"]
            told = b"".join(bytes(entry["bytes"] or ()) for entry in entries)
            straddles = len(content) < len(decoded)
            assert told.startswith(content.encode()) if straddles else told == content.encode()


def _may_call(params: dict[str, Any]) -> bool:
    return ("tools" in params and params.get("tool_choice") != "none") or "functions" in params


def tokens(db: Database, request_id: int, choice: int) -> list[int]:
    sql = (
        f"SELECT token_ids FROM chunks WHERE request_id = {request_id} AND choice = {choice}"
        " ORDER BY token_start"
    )
    with db.read() as rows:
        blobs = [bytes(row[0]) for row in rows.exec_driver_sql(sql)]
    joined = b"".join(blobs)
    return [int.from_bytes(joined[i : i + 4], "little") for i in range(0, len(joined), 4)]


# Not shrunk, which takes minutes: what fails is small enough to be read.
@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(params=PARAMS, stops=STOPS)
def test_whatever_is_killed_the_laws_hold_and_nothing_differs(
    place: Database, params: dict[str, Any], stops: list[Stop]
) -> None:
    golden, killed = submit(place, params), submit(place, params)
    work(place, golden, None)
    for stop in stops:
        work(place, killed, stop)
    work(place, killed, None)
    pairs = zip(views.results(place, golden), views.results(place, killed), strict=True)
    for quiet, disturbed in pairs:
        assert quiet.state == disturbed.state == "succeeded", disturbed.error
        folded = []
        for result in (quiet, disturbed):
            found = chunk_objects(place, result)
            check_stream(found, result, params)
            folded.append(fold(found))
            check_texts(place, folded[-1], result, params)
        assert without_ids(folded[0]) == without_ids(folded[1])
        assert [tokens(place, quiet.request_id, c.choice) for c in quiet.choices] == [
            tokens(place, disturbed.request_id, c.choice) for c in disturbed.choices
        ]
