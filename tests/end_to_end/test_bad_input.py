"""What cannot be run is refused by the command line: its code, one line, and no database."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.end_to_end.inside import Ended, penstock

TESTS = Path(__file__).parents[1]
MALFORMED = TESTS / "orchestrator/spec/malformed"
LLAMA = TESTS / "parity/models/llama"
JOB = """
name: sums
model: MODEL
dataset:
  items: [{a: 12, b: 30}, {a: 5, b: 9}, {a: 40, b: 41}, {a: 7, b: 7}]
params:
  messages: [{role: user, content: "What is {{ a }} + {{ b }}?"}]
  max_tokens: 24
  n: 2
  logprobs: true
  top_logprobs: 20
sweep: {temperature: [0, 1.0], seed: [1, 2]}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with nothing of Penstock's in the environment."""
    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PENSTOCK_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def tree(folder: Path) -> dict[str, bytes | None]:
    found = folder.rglob("*")
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


def line(ended: Ended) -> str:
    """The one line of the refusal; nothing else was said but which device is used."""
    said = [line for line in ended.err.splitlines() if not line.startswith("device ")]
    assert len(said) == 1, ended.err
    assert said[0].startswith("penstock: ") and ended.out == ""
    return said[0].removeprefix("penstock: ")


# --- jobs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(MALFORMED.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_malformed_job_exits_2_with_its_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MALFORMED)
    before = sorted(MALFORMED.rglob("*"))
    ended = penstock("run", file.name)
    expected = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    assert (ended.code, line(ended)) == (2, " ".join(expected.split()))
    assert sorted(MALFORMED.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "a job's YAML file, got is a directory"),
        ("folder.yaml", "a job's YAML file, got is a directory"),
        ("folder.yaml/none.yaml", "a job's YAML file, got no such file"),
        ("latin1.yaml", "text in UTF-8, got other bytes"),
        ("nul\0.yaml", "a job's YAML file, got embedded null byte"),
        ("x" * 5000, "a job's YAML file, got file name too long"),
        ("huge.yaml", "a file of at most 10485760 bytes, got more"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_what_is_no_job_file_exits_2(folder: Path, command: str, name: str, said: str) -> None:
    (folder / "folder.yaml").mkdir()
    (folder / "latin1.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    if name == "huge.yaml":
        (folder / name).write_text("# " + "x" * (10 * 2**20))
    before = tree(folder)
    ended = penstock(command, name)
    assert ended.code == 2 and said in line(ended)
    assert tree(folder) == before


# --- models ---------------------------------------------------------------------------------------


def configured(*path: str, value: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "genai_config.json").read_text())
        place = config["model"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (model / "genai_config.json").write_text(json.dumps(config))

    return change


def external(key: str, value: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        graph = onnx.load(str(model / "model.onnx"), load_external_data=False)
        entries = {e.key: e for e in graph.graph.initializer[0].external_data}
        entries[key].value = value
        (model / "model.onnx").write_bytes(graph.SerializeToString())

    return change


def cut(name: str, part: float) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        whole = (model / name).read_bytes()
        (model / name).write_bytes(whole[: int(len(whole) * part)])

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        raw = content if isinstance(content, bytes) else content.encode()
        (model / name).write_bytes(raw)

    return change


def removed(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def linked_outside(model: Path) -> None:
    (model / "model.onnx.data").rename(model.parent / "elsewhere")
    (model / "model.onnx.data").symlink_to(model.parent / "elsewhere")


def without_logits(model: Path) -> None:
    graph = onnx.load(str(model / "model.onnx"), load_external_data=False)
    next(o for o in graph.graph.output if o.name == "logits").name = "scores"
    (model / "model.onnx").write_bytes(graph.SerializeToString())


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 455936\n"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "graph empty": (cut("model.onnx", 0), "not a whole ONNX file"),
    "graph cut": (cut("model.onnx", 0.5), "not a whole ONNX file"),
    "graph a pointer": (written("model.onnx", LFS), "not a whole ONNX file"),
    "graph gone": (removed("model.onnx"), "'model.onnx' is not a file of the folder"),
    "graph without logits": (without_logits, "expected an output 'logits'"),
    "weights cut": (cut("model.onnx.data", 0.99), "truncated: weight"),
    "weights a pointer": (written("model.onnx.data", LFS), "truncated: weight"),
    "weights gone": (removed("model.onnx.data"), "weights file model.onnx.data is missing"),
    "weights above": (external("location", "../secret"), "lies outside the folder"),
    "weights elsewhere": (external("location", "/etc/passwd"), "lies outside the folder"),
    "weights linked": (linked_outside, "lies outside the folder"),
    "weights at NUL": (external("location", "a\0b"), "lies outside the folder"),
    "weights at a word": (external("offset", "ten"), "'ten': no whole number"),
    "no tokenizer": (removed("tokenizer.json"), "tokenizer.json is missing"),
    "tokenizer empty": (written("tokenizer.json", ""), "not a tokenizer"),
    "tokenizer cut": (cut("tokenizer.json", 0.5), "not a tokenizer"),
    "tokenizer a pointer": (written("tokenizer.json", LFS), "not a tokenizer"),
    "template gone": (removed("chat_template.jinja"), "no chat template"),
    "template broken": (written("chat_template.jinja", "{% if %}"), "the chat template is not"),
    "template no text": (written("chat_template.jinja", b"\xff\xfe"), "not UTF-8"),
    "tokenizer_config deep": (written("tokenizer_config.json", "[" * 99_999), "not JSON"),
    "config gone": (removed("genai_config.json"), "genai_config.json is missing"),
    "config empty": (written("genai_config.json", ""), "genai_config.json cannot be read"),
    "config deep": (written("genai_config.json", "[" * 99_999), "cannot be read"),
    "config a list": (written("genai_config.json", "[]"), "expected an object"),
    "other graph": (configured("decoder", "filename", value="../m/../x"), "not a file of the"),
    "NUL graph": (configured("decoder", "filename", value="a\0b"), "is not a file of the folder"),
    "names without number": (
        configured("decoder", "inputs", "past_key_names", value="past"),
        "past_key_names: expected a name with %d, got 'past'",
    ),
    "names of others": (
        configured("decoder", "outputs", "present_key_names", value="other.%d"),
        "and output 'other.0'",
    ),
    "layers too many": (
        configured("decoder", "num_hidden_layers", value=3),
        "expected input 'past_key_values.2.key', found none",
    ),
    "heads of no size": (configured("decoder", "head_size", value=0), "expected a whole number"),
    "heads too large": (configured("decoder", "head_size", value=10**15), "no memory for"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_exits_1_with_the_reason_and_no_database(folder: Path, name: str) -> None:
    change, said = BROKEN[name]
    (folder / "sums.yaml").write_text(JOB.replace("MODEL", "sums"))
    shutil.copytree(LLAMA, folder / "m", ignore=shutil.ignore_patterns("*.penstock-*"))
    change(folder / "m")
    for arguments in (("run", "sums.yaml", "--model", "m"), ("models", "check", "m")):
        ended = penstock(*arguments)
        assert ended.code == 1, ended.err
        told = line(ended)
        assert said in told and len(told) < 1000
        assert {path.name for path in folder.iterdir()} <= {"m", "sums.yaml", "elsewhere"}


def test_the_whole_model_passes_and_a_short_context_is_no_error(folder: Path) -> None:
    shutil.copytree(LLAMA, folder / "m", ignore=shutil.ignore_patterns("*.penstock-*"))
    configured("context_length", value=8)(folder / "m")
    ended = penstock("models", "check", "m", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["context_length"] == 8


# --- databases ------------------------------------------------------------------------------------


def fetched(sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect("penstock.db")) as connection:
        return connection.execute(sql).fetchall()


def test_a_database_that_can_only_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sums.yaml").write_text(JOB.replace("MODEL", "tiny"))
    assert penstock("db", "upgrade").code == 0
    with closing(sqlite3.connect("penstock.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = (folder / "penstock.db").read_bytes()
    only_read = "sqlite:///file:penstock.db?mode=ro&uri=true"
    monkeypatch.setenv("PENSTOCK_DATABASE_URL", only_read)
    ended = penstock("run", "sums.yaml")
    assert ended.code == 1
    assert "penstock.db?mode=ro&uri=true: it is read-only; nothing is lost" in line(ended)
    assert (folder / "penstock.db").read_bytes() == before
    assert penstock("status", "--json").out == "[]\n"
    monkeypatch.setenv("PENSTOCK_DATABASE_URL", only_read.replace("penstock.db", "none.db"))
    ended = penstock("status")
    assert (ended.code, line(ended)) == (2, "database 'none.db' does not exist")


BOUNDED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
runpy.run_module("orchestrator.cli", run_name="__main__", alter_sys=True)
"""


def bounded(kib: int, *arguments: str) -> Ended:
    """`penstock ARGUMENTS` in a process that can write no file beyond so many KiB."""
    ended = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(kib * 1024), *arguments],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "PENSTOCK_LEASE_SECONDS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_no_room_for_a_database(folder: Path) -> None:
    (folder / "sums.yaml").write_text(JOB.replace("MODEL", "tiny"))
    ended = bounded(60, "run", "sums.yaml")
    assert ended.code == 1
    assert line(ended) == "sqlite+pysqlite:///penstock.db: disk I/O error"
    assert fetched("SELECT * FROM sqlite_master") == []


def test_no_room_in_the_middle_and_room_again(folder: Path, tmp_path: Path) -> None:
    """It says so and stops; with room again it goes on to the tokens it would have had."""
    (folder / "sums.yaml").write_text(JOB.replace("MODEL", "tiny"))
    ended = bounded(430, "run", "sums.yaml")
    assert ended.code == 1, ended.err
    last = ended.err.splitlines()[-1]
    how = "nothing is lost, go on with: penstock run --resume sums.yaml"
    assert last == f"penstock: sqlite+pysqlite:///penstock.db: disk I/O error; {how}"
    assert "Traceback" not in ended.err and ended.out == ""
    ((begun, left),) = fetched(
        "SELECT sum(state = 'succeeded'), sum(state <> 'failed') FROM requests"
    )
    assert begun < left == 16
    again = penstock("run", "sums.yaml", "--resume")
    assert again.code == 0, again.err
    assert fetched("SELECT count(*) FROM jobs") == [(1,)]
    choices = "SELECT request_id, choice, n_tokens, finish_reason, text FROM choices ORDER BY 1, 2"
    resumed = fetched(choices)
    (folder / "penstock.db").rename(folder / "other.db")
    assert penstock("run", "sums.yaml").code == 0
    assert fetched(choices) == resumed
