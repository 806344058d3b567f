"""The command line as a person uses it: real processes, a real model, a database in a folder."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from orchestrator.cli import app
from tests.end_to_end.shell import JOB, Ended, Shell, long_job
from workers.folders.folder import TINY

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    (tmp_path / "sums.yaml").write_text(JOB)
    return Shell(tmp_path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Ended]]:
    """A folder in which `penstock run sums.yaml` has been run."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "sums.yaml").write_text(JOB)
    shell = Shell(folder)
    yield shell, shell("run", "sums.yaml")


def test_run_goes_the_whole_way_and_says_where_to_look(ran: tuple[Shell, Ended]) -> None:
    shell, ended = ran
    assert ended.code == 0, ended.err
    lines = [line.split() for line in ended.out.splitlines()]
    assert lines[0] == ["temperature", "requests", "failed", "tokens", "correct"]
    assert [line[0] for line in lines[1:3]] == ["0", "1.0"]
    assert re.search(r"requests: 8 succeeded, 0 failed\n", ended.out)
    assert re.search(r"\d+ tokens in [\d.]+ s here \([\d,]+ tokens/s\)", ended.out)
    # The device is named once, and nothing else is on stderr but the job.
    assert [line.split()[0] for line in ended.err.splitlines()] == ["device", "job"], ended.err
    further = ended.out.split("look further:\n")[1].strip().splitlines()
    assert further[0].startswith('  sqlite3 penstock.db "SELECT') or further[0].startswith(
        "sqlite3"
    )
    sql = further[0].split('"')[1]
    assert len(shell.rows(sql)) == 5
    for line in further[1:]:
        arguments = line.split()
        assert arguments[0] == "penstock"
        assert shell(*arguments[1:]).code == 0, line


def test_status_lists_jobs_and_shows_one_by_name_id_or_beginning(ran: tuple[Shell, Ended]) -> None:
    shell, _ = ran
    (job,) = json.loads(shell("status", "--json").out)
    assert (job["name"], job["state"], job["requests"]) == ("sums", "succeeded", 8)
    for given in ("sums", job["id"], job["id"][:-3]):
        shown = json.loads(shell("status", given, "--json").out)
        assert shown["id"] == job["id"]
    first = shown["points"][0]
    assert first["params"] == {"temperature": 0}
    assert (first["scores"]["correct"]["n"], first["scores"]["correct"]["n_items"]) == (8, 4)
    assert "sums" in shell("status").out
    assert "8 succeeded" in shell("status", "sums").out


def test_export_and_tail_tell_the_same_text(ran: tuple[Shell, Ended]) -> None:
    shell, _ = ran
    piped = shell("export", "sums")
    to_file = shell("export", "sums", "-o", "out.jsonl")
    assert (piped.code, to_file.code, to_file.out) == (0, 0, "")
    assert (shell.folder / "out.jsonl").read_text(encoding="utf-8") == piped.out
    lines = [json.loads(line) for line in piped.out.splitlines()]
    assert len(lines) == 8
    for line in lines[:2]:
        id, completion = str(line["request_id"]), line["completion"]
        texts = [choice["message"]["content"] for choice in completion["choices"]]
        expected = "".join(f"--- choice {i}\n{text}\n" for i, text in enumerate(texts))
        assert shell("tail", id).out == expected
        chunks = [json.loads(chunk) for chunk in shell("tail", id, "--json").out.splitlines()]
        assert {chunk["id"] for chunk in chunks} == {completion["id"]}
        assert [len(scores) for scores in line["scores"].values()] == [2]
    stored = "SELECT c.text FROM choices c ORDER BY request_id, choice"
    exported = [c["message"]["content"] for e in lines for c in e["completion"]["choices"]]
    assert [row[0] for row in shell.rows(stored)] == exported


def test_plan_writes_nothing_and_its_json_is_pure(shell: Shell) -> None:
    ended = shell("plan", "sums.yaml", "--json")
    assert (ended.code, ended.err) == (0, "")
    described = json.loads(ended.out)
    assert (described["n_requests"], described["n_choices"]) == (8, 16)
    assert described["max_total_tokens"] == 16 * 24
    assert described["examples"][0]["messages"][0]["content"] == "What is 12 + 30?"
    assert "at most 384 completion tokens" in shell("plan", "sums.yaml").out
    assert [path.name for path in shell.folder.iterdir()] == ["sums.yaml"]


def test_a_bundled_job_runs_by_its_name(shell: Shell) -> None:
    assert "quickstart: model tiny" in shell("plan", "quickstart").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "none.yaml"), "none.yaml: expected a job's YAML file, got no such file"),
        (("run", "broken.yaml"), "broken.yaml:2: name: expected "),
        (("run", "other.yaml"), "model 'other' does not exist"),
        (("run", "large.yaml"), "Invalid key in 'logit_bias': 99999. Maximum value is"),
        (("run", "wide.yaml"), "This model's maximum context length is"),
        (("run", "sums.yaml", "--model", "none"), "model 'none' does not exist"),
        (("status",), "database 'penstock.db' does not exist"),
        (("export", "sums"), "database 'penstock.db' does not exist"),
        (("resume", "sums"), "database 'penstock.db' does not exist"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(
    shell: Shell, arguments: tuple[str, ...], said: str
) -> None:
    files = {
        "broken.yaml": JOB.replace("name: sums", "name: [x]"),
        "other.yaml": JOB.replace("model: tiny", "model: other"),
        "large.yaml": JOB.replace("  n: 2", "  logit_bias: {99999: 1}"),
        "wide.yaml": JOB.replace("max_tokens: 24", "max_tokens: 100000"),
    }
    for name, text in files.items():
        (shell.folder / name).write_text(text)
    ended = shell(*arguments)
    last = ended.err.splitlines()[-1]
    assert ended.code == 2, ended.err
    assert last.startswith("penstock: ") and said in last
    assert ended.out == "" and "Traceback" not in ended.err
    assert not (shell.folder / "penstock.db").exists()


def test_what_the_machine_refuses_is_one_line_and_exits_1(shell: Shell) -> None:
    (shell.folder / "model").mkdir()
    ended = shell("run", "sums.yaml", "--model", "model")
    assert ended.code == 1
    assert ended.err.startswith("penstock: model folder ") and ended.err.count("\n") == 1
    (shell.folder / "penstock.db").write_text("this is no database, but long enough to be one")
    ended = shell("status")
    assert ended.code == 1
    assert "not a SQLite database" in ended.err and ended.err.count("\n") == 1


def test_an_unknown_setting_an_unknown_option_and_an_unknown_request_exit_2(
    ran: tuple[Shell, Ended],
) -> None:
    shell, _ = ran
    ended = shell("status", PENSTOCK_DATABSE_URL="x")
    assert ended.code == 2 and "PENSTOCK_DATABASE_URL" in ended.err
    assert shell("status", "--nonsense").code == 2
    ended = shell("tail", "5")
    assert (ended.code, ended.err) == (2, "penstock: request '5' does not exist\n")


def test_a_failed_request_makes_the_run_exit_1_and_is_named(
    ran: tuple[Shell, Ended], tmp_path: Path
) -> None:
    source = sqlite3.connect(ran[0].folder / "penstock.db")
    shell = Shell(tmp_path)
    with sqlite3.connect(tmp_path / "penstock.db") as copy:
        source.backup(copy)
        copy.execute(
            "UPDATE requests SET state='failed', error_code='poison', error_message='why not' "
            "WHERE id = (SELECT min(id) FROM requests)"
        )
    copy.close()
    source.close()
    ended = shell("resume", "sums")
    assert ended.code == 1
    assert "7 succeeded, 1 failed" in ended.out
    assert "failed: request 1000000000 (0): poison: why not" in ended.out
    tailed = shell("tail", "1000000000")
    assert tailed.code == 1 and "failed: poison: why not" in tailed.err
    (first, *_) = map(json.loads, shell("export", "sums").out.splitlines())
    assert first["error"] == {"code": "poison", "message": "why not"}


def texts(shell: Shell) -> list[tuple[Any, ...]]:
    return shell.rows(
        "SELECT r.item_id, c.choice, c.n_tokens, c.finish_reason, c.text FROM choices c "
        "JOIN requests r ON r.id = c.request_id ORDER BY 1, 2"
    )


def begun(shell: Shell) -> int:
    try:
        return int(shell.rows("SELECT count(*) FROM chunks")[0][0])
    except sqlite3.OperationalError:
        return 0


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_tokens(
    tmp_path: Path, golden: list[tuple[Any, ...]], sign: signal.Signals
) -> None:
    shell = Shell(tmp_path)
    long_job(tmp_path)
    process = shell.start("run", "long.yaml")
    while not begun(shell) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.1)
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    half = shell.rows("SELECT count(*) FROM choices WHERE finish_reason IS NOT NULL")[0][0]
    assert half < 48, "it was over before it was stopped: make it longer"
    assert "Traceback" not in err
    if sign != signal.SIGKILL:
        assert process.returncode == 130
        assert "stopped; nothing is lost, go on with: penstock run --resume long.yaml\n" in err
        assert shell.rows("SELECT count(*) FROM requests WHERE state = 'running'") == [(0,)]
    ended = shell("run", "long.yaml", "--resume")
    assert ended.code == 0, ended.err
    assert shell.rows("SELECT count(*) FROM jobs") == [(1,)]
    assert texts(shell) == golden
    again = shell("run", "long.yaml", "--resume")
    assert again.code == 0
    assert shell.rows("SELECT count(*) FROM jobs") == [(2,)], "a finished job is begun anew"


def test_stopped_while_it_plans_it_leaves_nothing_and_says_how_to_go_on(shell: Shell) -> None:
    # Few items, which are checked one by one before anything is written, at many points.
    many = "\n".join(json.dumps({"a": i, "b": i}) for i in range(5_000))
    (shell.folder / "many.jsonl").write_text(many)
    text = re.sub(r"dataset:\n.*\n", "dataset: {path: many.jsonl}\n", JOB)
    text = text.replace("sweep: {", f"sweep: {{seed: {list(range(100))}, ", 1)
    (shell.folder / "sums.yaml").write_text(text)
    process = shell.start("run", "sums.yaml", "--slots", "3")
    while not _planning(shell):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    how = "go on with: penstock run --resume sums.yaml --slots 3\n"
    assert err.endswith(f"stopped; nothing is lost, {how}") and "Traceback" not in err
    assert shell.rows("SELECT count(*) FROM jobs") == [(0,)]


def _planning(shell: Shell) -> bool:
    try:
        return bool(shell.rows("SELECT 1 FROM requests LIMIT 1"))
    except sqlite3.OperationalError:
        return False


def test_a_broken_model_hides_no_other(shell: Shell) -> None:
    models = shell.folder / "models"
    shutil.copytree(TINY, models / "whole", ignore=shutil.ignore_patterns("*.py"))
    for name, config in (("garbled", "{"), ("empty", "{}")):
        shutil.copytree(models / "whole", models / name)
        (models / name / "genai_config.json").write_text(config)
    ended = shell("models", "list")
    assert ended.code == 0, ended.err
    *table, empty, garbled = ended.out.splitlines()
    assert [line.split()[0] for line in table] == ["name", "tiny", "whole"]
    assert empty.startswith("broken: empty: model folder ")
    assert empty.endswith("genai_config.json: model: expected an object, got None")
    assert garbled.startswith("broken: garbled: ") and "cannot be read" in garbled
    found = {row["name"]: row for row in json.loads(shell("models", "list", "--json").out)}
    assert {name: bool(row["error"]) for name, row in found.items()} == {
        **{"tiny": False, "whole": False},
        **{"empty": True, "garbled": True},
    }
    assert found["whole"] == {**found["tiny"], "name": "whole", "path": str(models / "whole")}
    assert (found["empty"]["layers"], found["empty"]["path"]) == (None, str(models / "empty"))


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What an undisturbed run of the long job makes."""
    shell = Shell(tmp_path_factory.mktemp("golden"))
    long_job(shell.folder)
    ended = shell("run", "long.yaml")
    assert ended.code == 0, ended.err
    found = texts(shell)
    assert all(row[2] == 300 for row in found)
    return found


def test_a_reader_that_leaves_is_no_error(ran: tuple[Shell, Ended]) -> None:
    shell, _ = ran
    process = shell.start("export", "sums")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(60)
    process.stderr.close()
    assert "Traceback" not in err and "Exception" not in err


def test_a_full_disk_behind_stdout_is_one_line(ran: tuple[Shell, Ended]) -> None:
    shell, _ = ran
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", "export", "sums"],
            cwd=shell.folder,
            env={**os.environ, "PYTHONPATH": str(DOCS.parents[1])},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith("penstock: cannot write stdout: No space left on device\n")
    assert "Traceback" not in ended.stderr


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command with its options, as the application itself knows them."""
    root = typer.main.get_command(app)
    todo: list[tuple[str, Any]] = [("penstock", root)]
    while todo:
        name, command = todo.pop()
        inner = getattr(command, "commands", {})
        todo += [(f"{name} {each}", inner[each]) for each in inner]
        options = [
            o for p in command.params for o in p.opts + p.secondary_opts if o.startswith("-")
        ]
        if not inner or name == "penstock":
            yield name, options


@pytest.mark.parametrize(("name", "options"), list(commands()))
def test_every_command_and_option_is_documented_with_an_example(
    name: str, options: list[str]
) -> None:
    text = DOCS.read_text(encoding="utf-8")
    if name == "penstock":
        section = text.split("\n## ")[0]
    else:
        assert f"\n## {name}\n" in text
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert f"    {name}" in section
        callback = _find(name).callback
        assert f"Example: {name}" in (callback.__doc__ or "")
    for option in options:
        if option not in ("--help", "-h"):
            assert option in section, f"{name} {option} has no line in docs/cli.md"


def test_the_docs_name_no_command_that_is_not_there() -> None:
    known = {name for name, _ in commands()}
    told = re.findall(r"^## (penstock .+)$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(told) == known - {"penstock"}


def _find(name: str) -> Any:
    command: Any = typer.main.get_command(app)
    for word in name.split()[1:]:
        command = command.commands[word]
    return command
