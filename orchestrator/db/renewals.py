"""The requests and the usage of one flush: each table in one statement, where that pays.

On PostgreSQL a statement costs a message and the triggers on its table, however many rows it has:
all rows go in one, as arrays. SQLite, which lives in the process, takes them one by one. Knows
nothing of the fence: what comes here has passed it.
"""

from collections.abc import Mapping, Sequence

from sqlalchemy import (
    Boolean,
    Connection,
    Double,
    Integer,
    String,
    bindparam,
    case,
    func,
    text,
    update,
)

from orchestrator.db.columns import Json, now, seconds_from_now, storable, to_json
from orchestrator.db.tables import RequestRow

Rows = Sequence[Mapping[str, object]]


def renew(tx: Connection, rows: Rows, lease_seconds: float) -> None:
    """What goes on: its lease, and what the flush says of it; keys b_id, b_idle and so on."""
    if not rows:
        return
    if tx.dialect.name == "postgresql":
        tx.execute(_RENEW_ALL, {**_arrays(rows), "lease": lease_seconds})
    else:
        tx.execute(_RENEW, [{**row, "b_lease": lease_seconds} for row in rows])


def finish(tx: Connection, rows: Rows) -> None:
    """What has ended: the same, with b_state, b_code and b_message."""
    if not rows:
        return
    if tx.dialect.name == "postgresql":
        tx.execute(_FINISH_ALL, _arrays(rows))
    else:
        tx.execute(_FINISH, rows)


def spend(tx: Connection, rows: Rows) -> None:
    """The usage of attempts so far, instead of what was written before."""
    if not rows:
        return
    if tx.dialect.name == "postgresql":
        tx.execute(_SPEND_ALL, _arrays(rows))
    else:
        tx.execute(_SPEND, rows)


def _arrays(rows: Rows) -> dict[str, object]:
    """One list for each column, as PostgreSQL takes them."""
    return {name: [_plain(row[name]) for row in rows] for name in rows[0]}


def _plain(value: object) -> object:
    if isinstance(value, str):
        return storable(value, "postgresql")
    return to_json(value) if isinstance(value, list) else value


# Built once: a flush comes four times a second.
_REQUEST = (
    update(RequestRow)
    .where(RequestRow.id == bindparam("b_id"))
    .values(
        idle_attempts=func.coalesce(bindparam("b_idle", type_=Integer), RequestRow.idle_attempts),
        excused=case((bindparam("b_fresh", type_=Boolean), 0), else_=RequestRow.excused),
        failures=case((bindparam("b_fresh", type_=Boolean), 0), else_=RequestRow.failures),
        system_fingerprint=func.coalesce(
            bindparam("b_fingerprint", type_=String), RequestRow.system_fingerprint
        ),
        warnings=func.coalesce(bindparam("b_warnings", type_=Json), RequestRow.warnings),
    )
)
_RENEW = _REQUEST.values(leased_until=seconds_from_now(bindparam("b_lease", type_=Double)))
_FINISH = _REQUEST.values(
    state=bindparam("b_state"),
    error_code=bindparam("b_code"),
    error_message=bindparam("b_message"),
    leased_until=None,
    finished_at=now(),
)
_SPENT = (
    "INSERT INTO usage (request_id, attempt, prompt_tokens, cached_tokens, completion_tokens,"
    " replayed_tokens, worker_id)",
    "ON CONFLICT (request_id, attempt) DO UPDATE SET"
    " prompt_tokens = excluded.prompt_tokens, cached_tokens = excluded.cached_tokens,"
    " completion_tokens = excluded.completion_tokens, replayed_tokens = excluded.replayed_tokens",
)
_ONE = (
    "SELECT :request_id, :attempt, :prompt_tokens, :cached_tokens, :completion_tokens,"
    " :replayed_tokens, worker_id FROM requests WHERE id = :request_id"
)
_ALL = (
    "SELECT v.request_id, v.attempt, v.prompt, v.cached, v.completion, v.replayed, r.worker_id"
    " FROM unnest(CAST(:request_id AS bigint[]), CAST(:attempt AS integer[]),"
    " CAST(:prompt_tokens AS integer[]), CAST(:cached_tokens AS integer[]),"
    " CAST(:completion_tokens AS integer[]), CAST(:replayed_tokens AS integer[]))"
    " AS v (request_id, attempt, prompt, cached, completion, replayed)"
    " JOIN requests AS r ON r.id = v.request_id"
)
_SPEND, _SPEND_ALL = (text(f"{_SPENT[0]} {words} {_SPENT[1]}") for words in (_ONE, _ALL))

_SETS = (
    "UPDATE requests SET idle_attempts = coalesce(v.idle, requests.idle_attempts),"
    " excused = CASE WHEN v.fresh THEN 0 ELSE requests.excused END,"
    " failures = CASE WHEN v.fresh THEN 0 ELSE requests.failures END,"
    " system_fingerprint = coalesce(v.fingerprint, requests.system_fingerprint),"
    " warnings = coalesce(CAST(v.warnings AS json), requests.warnings)"
)
_VALUES = (
    " FROM unnest(CAST(:b_id AS bigint[]), CAST(:b_idle AS integer[]),"
    " CAST(:b_fresh AS boolean[]), CAST(:b_fingerprint AS text[]), CAST(:b_warnings AS text[])"
)
_NAMES = ") AS v (id, idle, fresh, fingerprint, warnings"
_SAME = ") WHERE requests.id = v.id"
_RENEW_ALL = text(
    f"{_SETS}, leased_until ="
    " clock_timestamp() + make_interval(secs => CAST(:lease AS double precision))"
    f"{_VALUES}{_NAMES}{_SAME}"
)
_FINISH_ALL = text(
    f"{_SETS}, state = v.state, error_code = v.code, error_message = v.message,"
    f" leased_until = NULL, finished_at = clock_timestamp(){_VALUES},"
    " CAST(:b_state AS text[]), CAST(:b_code AS text[]), CAST(:b_message AS text[])"
    f"{_NAMES}, state, code, message{_SAME}"
)
