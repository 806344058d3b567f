"""A database URL -> connections that read or write, its schema brought up to date.

SQLite: WAL, synchronous FULL, foreign keys, BEGIN IMMEDIATE for writes (one writer, no upgrade
of a read lock to fail on). PostgreSQL: psycopg 3, READ COMMITTED; a session that does nothing amid
a transaction is ended by the server, so that a frozen process holds no row for ever. Whatever the
database refuses becomes one WorkerError with code "database"; what was being written is rolled
back.

Knows nothing of tables or transitions but the name and number of the schema.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import clear_frames
from typing import Self

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from orchestrator.db.columns import to_json
from orchestrator.errors import WorkerError

SCHEMA = "0006"
"""The newest revision in `migrations/versions`; a test holds the two equal."""

SCHEMA_TABLE = "penstock_schema"
BUSY_SECONDS = 30
IDLE_SECONDS = 15
"""Half a lease, as it is by default: what a frozen worker locks is free before it is expired."""
PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""How PostgreSQL's client notices a host that is gone without a word, within half a minute; the
last in milliseconds. What the URL says goes before."""
_MIGRATION_LOCK = 0x70656E73746F636B


class Database:
    """One database. Thread-safe; each `read` or `write` takes a connection of its own.

    Open it with `Database.open`; close it with `close` or a `with` statement.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.dialect = engine.dialect.name
        self._shown = engine.url.render_as_string(hide_password=True)

    @classmethod
    def open(cls, url: str, *, migrate: bool = True) -> Self:
        """Connect, and create or upgrade the schema unless `migrate` is false.

        `url`: `sqlite:///FILE` or `postgresql://USER@HOST/NAME`, as SQLAlchemy reads them.
        Raises WorkerError (code "database") when it cannot be reached, written or understood.
        """
        db = cls(_engine(url))
        try:
            db._prepare(migrate)
        except BaseException:
            db.close()
            raise
        return db

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the idle connections; the object stays usable and would open new ones."""
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection in a read transaction: on SQLite one snapshot, rolled back at the end."""
        with self._errors(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A connection in a write transaction, committed at the end, rolled back on any error.

        Raises WorkerError also when the answer to COMMIT was lost: the write may have happened.
        """
        with (
            self._errors(),
            self.engine.connect() as connection,
            connection.execution_options(penstock_write=True).begin(),
        ):
            yield connection

    def upgrade(self) -> None:
        """Bring the schema to `SCHEMA`; safe to run from several processes at once.

        On SQLite foreign keys are off meanwhile (Alembic's batch mode drops and recreates
        tables, which would cascade into their children) and checked before the commit.
        """
        with self._errors(), self.engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            if raw is None:
                raise WorkerError("database", f"{self._shown}: the connection is gone")
            try:
                if self.dialect == "sqlite":
                    _pragma(raw, "foreign_keys=OFF")
                with connection.execution_options(penstock_write=True).begin():
                    self._migrate(connection)
            finally:
                if self.dialect == "sqlite":
                    _pragma(raw, "foreign_keys=ON")

    def _prepare(self, migrate: bool) -> None:
        with self.read() as connection:
            found = self._schema(connection)
        if found == SCHEMA:
            return
        if found is not None and found > SCHEMA:
            raise WorkerError(
                "database",
                f"{self._shown}: its schema {found} is newer than this Penstock knows ({SCHEMA}): "
                "upgrade Penstock",
            )
        if not migrate:
            state = "has no Penstock schema" if found is None else f"has the old schema {found}"
            raise WorkerError("database", f"{self._shown}: {state}: run `penstock db upgrade`")
        self.upgrade()

    def _schema(self, connection: Connection) -> str | None:
        tables = inspect(connection).get_table_names()
        if SCHEMA_TABLE in tables:
            version = text(f"SELECT version_num FROM {SCHEMA_TABLE}")  # noqa: S608
            return str(connection.scalar(version))
        if tables:
            raise WorkerError(
                "database",
                f"{self._shown}: it holds tables of something else ({', '.join(tables[:3])}): "
                "give Penstock a database of its own",
            )
        return None

    def _migrate(self, connection: Connection) -> None:
        # Alembic takes a tenth of a second to import: only those who migrate pay it.
        from alembic import command
        from alembic.config import Config

        if self.dialect == "postgresql":
            lock = text("SELECT pg_advisory_xact_lock(:key)")
            connection.execute(lock, {"key": _MIGRATION_LOCK})
        config = Config()
        config.set_main_option("script_location", str(migrations()).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        config.attributes.update(connection=connection, version_table=SCHEMA_TABLE)
        command.upgrade(config, SCHEMA)
        if self.dialect == "sqlite":
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            if broken:
                raise WorkerError(
                    "database",
                    f"{self._shown}: {len(broken)} rows lost their parent in the migration; "
                    f"nothing was changed, first: {tuple(broken[0])}",
                )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, ProgrammingError):
            raise  # a bug, or a broken unique key that the caller names better
        except DBAPIError as error:
            clear_frames(error.__traceback__)  # a cursor in them would keep its connection open
            raise WorkerError("database", f"{self._shown}: {_reason(error)}") from error
        except PoolTimeoutError as error:
            raise WorkerError("database", f"{self._shown}: no free connection") from error
        except (KeyboardInterrupt, SystemExit) as error:
            clear_frames(error.__traceback__)  # nor may it keep its transaction, and the lock
            raise


def migrations() -> Path:
    """The folder of the migrations: inside an installed wheel, or at the checkout's top."""
    package = Path(__file__).parent.parent
    installed = package / "_migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def _engine(url: str) -> Engine:
    parsed = _parsed(url)
    if parsed.get_backend_name() == "postgresql":
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            json_serializer=to_json,
            hide_parameters=True,  # they may be prompts and secrets, and errors are logged
            pool_pre_ping=True,
            connect_args={k: v for k, v in PATIENCE.items() if k not in parsed.query},
        )
        event.listen(engine, "connect", _postgresql_connect)
        event.listen(engine, "handle_error", _postgresql_error)
        return engine
    engine = create_engine(
        parsed.set(drivername="sqlite+pysqlite"),
        json_serializer=to_json,
        hide_parameters=True,  # they may be prompts and secrets, and errors are logged
        connect_args={"timeout": BUSY_SECONDS},
    )
    event.listen(engine, "connect", _sqlite_connect)
    event.listen(engine, "begin", _sqlite_begin)
    event.listen(engine, "handle_error", _sqlite_error)
    return engine


def _parsed(url: str) -> URL:
    expected = "expected sqlite:///FILE or postgresql://USER@HOST/NAME as the database's URL"
    if url.startswith("postgres://"):
        url = "postgresql" + url.removeprefix("postgres")
    try:
        parsed = make_url(url)
    except ArgumentError:
        # The text may hold a password: it is not repeated.
        raise WorkerError("database", f"{expected}, got something that is no URL") from None
    shown = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise WorkerError("database", f"{expected}, got {shown}")
    if parsed.get_backend_name() == "sqlite":
        name = parsed.database or ""
        if name in ("", ":memory:") or parsed.query.get("mode") == "memory":
            raise WorkerError(
                "database", f"{expected}, got {shown}: threads and processes share the file"
            )
        folder = Path(name).parent
        if not name.startswith("file:") and not folder.is_dir():
            raise WorkerError("database", f"{shown}: the folder {folder} does not exist")
    return parsed


def _postgresql_connect(raw: DBAPIConnection, _record: object) -> None:
    # Not where the server, the role or the URL says something of its own.
    cursor = raw.cursor()
    try:
        cursor.execute(
            "SELECT set_config('idle_in_transaction_session_timeout', %s, false) "
            "WHERE current_setting('idle_in_transaction_session_timeout') = '0'",
            (f"{IDLE_SECONDS}s",),
        )
    finally:
        cursor.close()
    raw.commit()


def _postgresql_error(context: ExceptionContext) -> None:
    """Keep the first line of what it says: the others repeat rows, which may be prompts."""
    raised, shown = context.original_exception, context.sqlalchemy_exception
    said = str(raised)
    first = said.partition("\n")[0]
    raised.args = (first,)
    if shown is not None:
        shown.args = tuple(str(each).replace(said, first) for each in shown.args)


def _sqlite_connect(raw: DBAPIConnection, _record: object) -> None:
    raw.isolation_level = None  # the driver begins nothing by itself: `_sqlite_begin` does
    _pragma(raw, "synchronous=FULL")
    _pragma(raw, "foreign_keys=ON")
    # Reading the mode first lets a read-only file that is in WAL mode already be opened.
    if _pragma(raw, "journal_mode") != "wal":
        _sqlite_wal(raw)


def _sqlite_wal(raw: DBAPIConnection) -> None:
    """Change a new file to WAL, waiting for whoever else writes its first pages.

    SQLite itself does not wait here: the change makes a read lock a write lock, and two that
    waited so would wait for each other.
    """
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            _pragma(raw, "journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def _pragma(raw: DBAPIConnection, pragma: str) -> object:
    cursor = raw.cursor()
    try:
        row = cursor.execute(f"PRAGMA {pragma}").fetchone()
    finally:
        cursor.close()
    return row[0] if row else None


def _sqlite_begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("penstock_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _sqlite_error(context: ExceptionContext) -> None:
    """What was opened on a read-only disk stays read-only when the disk is not: open it anew."""
    if "readonly" in str(context.original_exception):
        context.is_disconnect = True


_REASONS: tuple[tuple[str, str], ...] = (
    ("readonly", "it is read-only"),
    ("read-only", "it is read-only"),
    ("disk is full", "the disk is full"),
    ("No space left", "the disk is full"),
    ("not a database", "the file is not a SQLite database"),
    ("malformed", "the file is damaged (database disk image is malformed)"),
    ("unable to open", "the file cannot be opened"),
    ("database is locked", f"another process kept it locked for {BUSY_SECONDS} s"),
)


def _reason(error: DBAPIError) -> str:
    """One line that says what the database said."""
    said = " ".join(str(error.orig).split())
    for sign, reason in _REASONS:
        if sign in said:
            return reason
    return said


__all__ = ["SCHEMA", "Database", "migrations"]
