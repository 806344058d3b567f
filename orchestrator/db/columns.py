"""The kinds of columns, and the database's clock, alike on SQLite and PostgreSQL.

Knows nothing of tables.
"""

import json
from datetime import UTC, datetime

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Integer, String, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator


class Instant(TypeDecorator[datetime]):
    """An aware UTC datetime: `timestamptz` on PostgreSQL, UTC text without a zone on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Words(TypeDecorator[str]):
    """Text; PostgreSQL cannot hold U+0000 and stores U+FFFD in its place (token ids stay true)."""

    impl = Text()
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value if value is None else storable(value, dialect.name)


def storable(text: str, dialect: str) -> str:
    """The text as the dialect can hold it; see `Words`."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if dialect == "postgresql" else text


def to_json(value: object) -> str:
    """Compact JSON, readable in SQL; lone surrogates, which UTF-8 cannot hold, stay escaped.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text


class now(FunctionElement[datetime]):
    """The database's clock: the wall time now, not the transaction's start."""

    type = Instant()
    inherit_cache = True


class seconds_from_now(FunctionElement[datetime]):
    """The database's clock plus its one argument, in seconds (may be negative)."""

    type = Instant()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: SQLCompiler, **kw: object) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f', 'now')"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: SQLCompiler, **kw: object) -> str:
    return "clock_timestamp()"


@compiles(seconds_from_now, "sqlite")
def _later_sqlite(element: seconds_from_now, compiler: SQLCompiler, **kw: object) -> str:
    seconds = compiler.process(element.clauses)
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now', ({seconds}) || ' seconds')"


@compiles(seconds_from_now, "postgresql")
def _later_postgresql(element: seconds_from_now, compiler: SQLCompiler, **kw: object) -> str:
    seconds = compiler.process(element.clauses)
    return f"clock_timestamp() + make_interval(secs => CAST({seconds} AS double precision))"


class unranked(FunctionElement[str]):
    """Its one argument, a column, as a value by which SQLite chooses no index.

    Without statistics SQLite takes an index on the equal columns before a partial one that holds a
    few rows of millions. PostgreSQL knows how large each is.
    """

    type = String()
    inherit_cache = True


@compiles(unranked)
def _ranked(element: unranked, compiler: SQLCompiler, **kw: object) -> str:
    return str(compiler.process(element.clauses))


@compiles(unranked, "sqlite")
def _unranked_sqlite(element: unranked, compiler: SQLCompiler, **kw: object) -> str:
    return f"+{compiler.process(element.clauses)}"


# INTEGER PRIMARY KEY is SQLite's row id itself: no second index.
Id = BigInteger().with_variant(Integer(), "sqlite")
Json = JSON(none_as_null=True)
