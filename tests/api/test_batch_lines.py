"""Every line of a batch that is wrong is named with its number, and then nothing runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator import files
from orchestrator.batches import look
from orchestrator.db import batches as batch_rows
from orchestrator.db.database import Database
from tests.api.batching import entered, jsonl, line, looking_after
from tests.orchestrator.db.builders import rows

Json = dict[str, Any]

WRONG: list[tuple[bytes | Json, str, str | None]] = [
    (b"{not json}\n", "invalid_json_line", None),
    (b"[1]\n", "invalid_json_line", None),
    (b'{"custom_id": "\xff"}\n', "invalid_json_line", None),
    (line("b") | {"extra": 1}, "unknown_parameter", "extra"),
    ({k: v for k, v in line("b").items() if k != "custom_id"}, "missing_required_parameter",
     "custom_id"),
    ({k: v for k, v in line("b").items() if k != "body"}, "missing_required_parameter", "body"),
    (line(7), "invalid_type", "custom_id"),
    (line(""), "invalid_value", "custom_id"),
    (line("x" * 513), "invalid_value", "custom_id"),
    (line("a"), "duplicate_custom_id", "custom_id"),
    (line("b") | {"method": "GET"}, "invalid_method", "method"),
    (line("b") | {"url": "/v1/embeddings"}, "invalid_url", "url"),
    (line("b") | {"body": "no"}, "invalid_type", "body"),
    (line("b", temperature=3), "decimal_above_max_value", "body.temperature"),
    (line("b", nonsense=1), "unknown_parameter", "body.nonsense"),
    (line("b", messages=[]), "empty_array", "body.messages"),
    (line("b", n=5), "integer_above_max_value", "body.n"),
    (line("b", stream_options={"include_usage": True}), "invalid_request", "body.stream_options"),
    (line("b", max_completion_tokens=4), "invalid_value", "body.max_completion_tokens"),
    (line("b", model="other"), "mismatched_model", "body.model"),
    (line("b", user="x" * 2**20), "line_too_long", None),
]  # fmt: skip


@pytest.mark.parametrize("wrong", range(len(WRONG)))
def test_every_wrong_line_is_named_and_nothing_runs(
    wrong: int, sqlite_db: Database, tmp_path: Path
) -> None:
    """The line's number counts blank lines; the right ones beside it do not run."""
    given, code, param = WRONG[wrong]
    raw = given if isinstance(given, bytes) else jsonl([given])
    with looking_after(sqlite_db, tmp_path / "files", max_choices=4, max_body_mib=1) as my:
        batch_id = entered(my, jsonl([line("a")]) + b"\n" + raw + jsonl([line("c")]))
        look(my)
    found = batch_rows.batch(sqlite_db, batch_id)
    assert found.status == "failed"
    assert found.errors is not None
    assert [(e["line"], e["code"], e["param"]) for e in found.errors] == [(3, code, param)]
    assert all(error["message"] for error in found.errors)
    assert rows(sqlite_db, "SELECT id FROM jobs") == []


def test_the_file_as_a_whole(sqlite_db: Database, tmp_path: Path) -> None:
    """Empty, too long, of a model that nobody knows, gone; and no more than 100 errors are kept."""
    with looking_after(sqlite_db, tmp_path / "files", max_batch_lines=3) as my:
        cases = {
            entered(my, b"\n \n"): ("empty_file", None),
            entered(my, jsonl(line(str(n)) for n in range(4))): ("too_many_requests", 4),
            entered(my, jsonl([line("a", model="nobody")])): ("model_not_found", 1),
            (gone := entered(my, jsonl([line("a")]))): ("input_file_missing", None),
        }
        files.remove(my.folder, batch_rows.batch(sqlite_db, gone).input_file_id)
        look(my)
        for batch_id, expected in cases.items():
            errors = batch_rows.batch(sqlite_db, batch_id).errors
            assert errors is not None
            assert [(error["code"], error["line"]) for error in errors] == [expected]
    with looking_after(sqlite_db, tmp_path / "files") as my:
        batch_id = entered(my, b"x\n" * 250)
        look(my)
        errors = batch_rows.batch(sqlite_db, batch_id).errors
        assert errors is not None
        assert [error["line"] for error in errors] == list(range(1, 101))
