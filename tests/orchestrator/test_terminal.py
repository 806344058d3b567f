"""What a person reads: durations, paces, tables of any text, lines that look further."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from orchestrator.db.views import JobStatus, Worker
from orchestrator.evaluation.report import report
from orchestrator.terminal import (
    JobProgress,
    Pace,
    duration,
    print_further,
    print_job,
    print_plan,
    print_table,
    print_workers,
    say,
    visible,
)

STATUS = JobStatus(
    id="job_1",
    name="sums",
    model="tiny",
    state="running",
    requests=100,
    queued=60,
    running=20,
    succeeded=15,
    failed=5,
    cancelled=0,
    prompt_tokens=1000,
    completion_tokens=4000,
    replayed_tokens=0,
    created_at=datetime(2026, 1, 2, tzinfo=UTC),
    finished_at=None,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7.44, "7.4 s"), (65, "1 min 05 s"), (3599.9, "1 h 00 min"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_pace_is_counted_from_where_this_run_began() -> None:
    later = replace(STATUS, queued=20, succeeded=55, completion_tokens=10_000)
    assert Pace.between(STATUS, later, 10.0) == Pace(600.0, 10.0)
    assert str(Pace.between(STATUS, later, 10.0)) == "600 tokens/s, 10.0 s left"
    assert str(Pace.between(STATUS, STATUS, 1.0)) == "0 tokens/s"


def test_text_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[2Jb\x07\r\x9b\n\té") == "a\\x1b[2Jb\\x07\\r\\x9b\n\té"


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    say("[red]:smile: \x1b[31m" + "x" * 500)
    print_table(("a", "b"), [["[bold]", "\x1b"]])
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "[red]:smile: \\x1b[31m" + "x" * 500
    assert "[bold]" in out and "\x1b" not in out


def test_an_open_job_says_what_is_open(capsys: pytest.CaptureFixture[str]) -> None:
    print_job(STATUS, report([]))
    out = capsys.readouterr().out
    assert "requests: 15 succeeded, 5 failed, 80 open\n" in out
    assert "tokens: 1,000 prompt, 4,000 completion\n" in out


def test_a_job_says_its_deadline_or_why_it_was_cancelled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    due = datetime(2026, 1, 3, 4, 5, 6, tzinfo=UTC)
    print_job(replace(STATUS, deadline_at=due), report([]))
    assert "deadline: 2026-01-03 04:05:06 UTC\n" in capsys.readouterr().out
    cancelled = replace(STATUS, deadline_at=due, cancel_reason="wrong \x1b prompt")
    print_job(cancelled, report([]))
    out = capsys.readouterr().out
    assert "cancelled: wrong \\x1b prompt\n" in out and "deadline" not in out


def test_the_fleet_is_a_table_with_dashes_for_what_is_not_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    new = Worker("w1", "a", 7, "tiny", "cpu", 16, at, at, alive=True)
    told = replace(
        new,
        id="w2",
        slots_used=3,
        tokens_per_second=1234.5,
        memory_bytes=3 * 2**20,
        alive=False,
    )
    print_workers([new, told])
    header, first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[:5] == ["worker", "host", "model", "device", "state"]
    seen = ["2026-01-02", "03:04:05"]
    assert first == ["w1", "a:7", "tiny", "cpu", "live", *seen, "-", "of", "16", "-", "-"]
    expected = ["w2", "a:7", "tiny", "cpu", "not", "seen", *seen]
    assert second == [*expected, "3", "of", "16", "1,234", "3", "MiB"]


def test_a_password_is_in_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_further(STATUS, "postgresql+psycopg://me:secret@db/penstock", 7)
    print_further(STATUS, "sqlite:////tmp/a b/penstock.db", None)
    out = capsys.readouterr().out
    assert "secret" not in out
    assert '  psql postgresql://me@db/penstock -c "SELECT ' in out
    assert "  sqlite3 '/tmp/a b/penstock.db' \"SELECT " in out
    assert out.count("penstock tail 7\n") == 1


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 5.5, 6.0, 20.0])
    monkeypatch.setattr("orchestrator.terminal.time.monotonic", lambda: next(clock, 20.0))
    with JobProgress(STATUS) as progress:
        for _ in range(4):
            progress.show(STATUS)
    captured = capsys.readouterr()
    assert captured.out == ""
    line = "sums: 20/100 requests, 5 failed, 0 tokens/s"
    assert captured.err.splitlines() == [line, line]


def test_a_plan_shows_what_its_messages_say_and_call(capsys: pytest.CaptureFixture[str]) -> None:
    call = {"name": "f", "arguments": '{"a": 1}'}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": call}] * 2},
        {"role": "tool", "tool_call_id": "1", "content": ""},
        {"role": "assistant", "content": "So", "function_call": call},
    ]
    numbers = {"n_items": 1, "n_points": 1, "n_requests": 1, "n_choices": 1}
    example = {"custom_id": "0", "messages": messages}
    about = {"name": "a", "model": "tiny", "max_total_tokens": None, "points": []}
    print_plan({**about, **numbers, "examples": [example]})
    assert capsys.readouterr().out.splitlines()[2:] == [
        "item 0:",
        "  user: Hi",
        '  assistant: f({"a": 1}); f({"a": 1})',
        "  tool: ",
        '  assistant: So; f({"a": 1})',
    ]
