"""Opening: the schema is made, checked and never half made; what cannot be opened says why."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from orchestrator.db import database, store
from orchestrator.db.columns import now, seconds_from_now
from orchestrator.db.database import SCHEMA, SCHEMA_TABLE, Database, migrations
from orchestrator.db.tables import Row, job_status
from orchestrator.errors import WorkerError
from tests.orchestrator.db.builders import claim_some, rows, run, small_plan, write
from tests.servers import PostgresServer

TABLES = set(Row.metadata.tables)


def test_the_migrated_schema_is_that_of_the_tables(db: Database) -> None:
    options = {
        "version_table": SCHEMA_TABLE,
        "compare_type": True,
        "compare_server_default": db.dialect == "postgresql",
    }
    with db.read() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Row.metadata) == []
        inspector = inspect(connection)
        for name, table in Row.metadata.tables.items():
            found = inspector.get_pk_constraint(name)
            assert found["constrained_columns"] == [column.name for column in table.primary_key]
            assert found["name"] == f"pk_{name}"
            keys = {
                (k["name"], k["options"].get("ondelete")) for k in inspector.get_foreign_keys(name)
            }
            assert keys == {(str(k.name), k.ondelete) for k in table.foreign_key_constraints}
            defaults = {c["name"] for c in inspector.get_columns(name) if c["default"] is not None}
            counted = table.autoincrement_column  # by a default, on PostgreSQL alone
            defaults -= {counted.name} if counted is not None else set()
            assert defaults == {c.name for c in table.columns if c.server_default is not None}


def test_chunks_are_clustered_by_their_key_on_sqlite(sqlite_db: Database) -> None:
    made = dict(rows(sqlite_db, "SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
    without = {name for name, sql in made.items() if "WITHOUT ROWID" in sql}
    assert without == {"turns", "choices", "chunks", "usage", "scores"}


def test_the_view_has_the_columns_that_python_reads(db: Database) -> None:
    with db.read() as connection:
        found = [column["name"] for column in inspect(connection).get_columns("job_status")]
    assert found == [column.name for column in job_status.columns]


def test_the_newest_migration_is_the_one_expected(db: Database) -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations()))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_current_head() == SCHEMA
    assert rows(db, f"SELECT version_num FROM {SCHEMA_TABLE}") == [(SCHEMA,)]


def test_migrating_again_changes_nothing(db: Database) -> None:
    store.insert_job(db, small_plan())
    db.upgrade()
    url = db.engine.url.render_as_string(hide_password=False)
    with Database.open(url) as again:
        assert len(claim_some(again)) == 4


def test_many_open_a_new_database_at_once(empty_url: str) -> None:
    start = threading.Barrier(6)

    def open_it(_: int) -> int:
        start.wait()
        with Database.open(empty_url) as db:
            return len(rows(db, "SELECT * FROM jobs"))

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(open_it, range(6))) == [0] * 6


def test_a_new_file_that_another_writes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in WAL yet, so that SQLite refuses the change to it at once."""
    file = tmp_path / "penstock.db"
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    with contextlib.closing(other):
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.5, other.execute, ["ROLLBACK"])
        release.start()
        Database.open(f"sqlite:///{file}").close()
        release.join()
    file = tmp_path / "locked.db"
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(WorkerError, match=r"another process kept it locked for"):
            Database.open(f"sqlite:///{file}")
    Database.open(f"sqlite:///{file}").close()


def test_many_processes_open_a_new_database_at_once(empty_url: str) -> None:
    program = (
        "import sys; from orchestrator.db.database import Database; "
        "Database.open(sys.argv[1]).close()"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, empty_url], stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    said = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said


def test_without_migration_the_schema_is_asked_for(empty_url: str) -> None:
    with pytest.raises(WorkerError, match="has no Penstock schema: run `penstock db upgrade`"):
        Database.open(empty_url, migrate=False)
    Database.open(empty_url).close()
    Database.open(empty_url, migrate=False).close()


def test_a_newer_schema_is_refused(empty_url: str) -> None:
    with Database.open(empty_url) as db, db.write() as tx:
        tx.exec_driver_sql(f"UPDATE {SCHEMA_TABLE} SET version_num = '9999'")
    with pytest.raises(WorkerError, match="its schema 9999 is newer than this Penstock knows"):
        Database.open(empty_url)


def test_an_interrupted_migration_leaves_nothing(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SCHEMA", "9999")
    with pytest.raises(Exception, match="9999"):
        Database.open(empty_url)
    monkeypatch.undo()
    last = max((migrations() / "versions").glob("*.py"))
    whole = last.read_text()
    broken = whole.replace(
        "\n\n\ndef downgrade", "\n    op.execute('SELECT oops')\n\n\ndef downgrade"
    )
    assert broken != whole
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "migrations"
        shutil.copytree(migrations(), copy)
        (copy / "versions" / last.name).write_text(broken)
        monkeypatch.setattr(database, "migrations", lambda: copy)
        with pytest.raises(Exception, match="oops"):
            Database.open(empty_url)
    monkeypatch.undo()
    with Database.open(empty_url, migrate=True) as db:
        assert rows(db, "SELECT * FROM jobs") == []


def test_a_migration_that_recreates_a_parent_keeps_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alembic's batch mode drops and recreates a table: with foreign keys on, children go too."""
    copy = _with_migration(
        tmp_path,
        "with op.batch_alter_table('requests', recreate='always') as batch:\n"
        "        batch.add_column(sa.Column('extra', sa.Text()))",
    )
    url = f"sqlite:///{tmp_path / 'x.db'}"
    with Database.open(url) as db:
        store.insert_job(db, small_plan(3, (0,), n=2))
        for view in ("request_text", "job_status"):
            with db.write() as tx:
                tx.exec_driver_sql(f"DROP VIEW {view}")
        monkeypatch.setattr(database, "migrations", lambda: copy)
        monkeypatch.setattr(database, "SCHEMA", "9999")
        db.upgrade()
        assert rows(db, "SELECT count(*) FROM choices") == [(6,)]
        assert rows(db, "SELECT DISTINCT extra FROM requests") == [(None,)]
        assert rows(db, "PRAGMA foreign_keys") == [(1,)]
        assert rows(db, "PRAGMA foreign_key_check") == []


def test_a_migration_that_orphans_rows_is_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = _with_migration(tmp_path, "op.execute('DELETE FROM requests')")
    with Database.open(f"sqlite:///{tmp_path / 'x.db'}") as db:
        store.insert_job(db, small_plan(3, (0,)))
        monkeypatch.setattr(database, "migrations", lambda: copy)
        monkeypatch.setattr(database, "SCHEMA", "9999")
        with pytest.raises(WorkerError, match="3 rows lost their parent in the migration"):
            db.upgrade()
        assert rows(db, "SELECT count(*) FROM requests") == [(3,)]
        assert rows(db, f"SELECT version_num FROM {SCHEMA_TABLE}") == [(SCHEMA,)]
        assert rows(db, "PRAGMA foreign_keys") == [(1,)]


def test_sqlite_settings(sqlite_db: Database) -> None:
    for pragma, value in {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 30_000,
    }.items():
        assert rows(sqlite_db, f"PRAGMA {pragma}") == [(value,)]


def test_a_write_takes_the_lock_at_once(sqlite_db: Database) -> None:
    """A transaction that reads first and writes later must not fail to upgrade its lock."""
    store.insert_job(sqlite_db, small_plan(1, (0,)))

    def raise_priority(_: int) -> None:
        for _ in range(20):
            with sqlite_db.write() as tx:
                priority = tx.exec_driver_sql("SELECT priority FROM jobs").scalar_one()
                tx.exec_driver_sql(f"UPDATE jobs SET priority = {priority + 1}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(raise_priority, range(4)))
    assert rows(sqlite_db, "SELECT priority FROM jobs") == [(80,)]


def test_an_error_rolls_the_write_back(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    with pytest.raises(ZeroDivisionError), db.write() as tx:
        tx.exec_driver_sql("DELETE FROM jobs")
        raise ZeroDivisionError
    assert rows(db, "SELECT count(*) FROM jobs") == [(1,)]


def test_the_clock_is_the_databases_and_goes_on_within_a_transaction(db: Database) -> None:
    with db.read() as connection:
        first = connection.scalar(now().select())
        while (second := connection.scalar(now().select())) == first:
            pass
        later = connection.scalar(seconds_from_now(90.25).select())
        before = connection.scalar(seconds_from_now(-0.5).select())
    assert first is not None and second is not None and later is not None and before is not None
    assert first.tzinfo is not None
    assert first < second
    assert 90 < (later - second).total_seconds() < 95
    assert -0.6 < (before - second).total_seconds() < 4


# What cannot be opened


def _refused(url: str) -> str:
    with pytest.raises(WorkerError) as caught:
        Database.open(url)
    assert caught.value.code == "database"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("Dear diary, " * 200)
    assert "notes.txt: the file is not a SQLite database" in _refused(f"sqlite:///{file}")
    assert file.read_text() == "Dear diary, " * 200


def test_a_truncated_database(tmp_path: Path) -> None:
    file = tmp_path / "x.db"
    with Database.open(f"sqlite:///{file}") as db:
        store.insert_job(db, small_plan())
    file.write_bytes(file.read_bytes()[:6000])
    assert "the file is damaged" in _refused(f"sqlite:///{file}")


def test_a_database_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "else.db"
    with contextlib.closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")
    before = file.read_bytes()
    assert "it holds tables of something else (bookmarks)" in _refused(f"sqlite:///{file}")
    with contextlib.closing(sqlite3.connect(file)) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("bookmarks",)]
    assert len(before) == file.stat().st_size


def test_a_schema_of_its_own_beside_something_else(postgresql_url: str) -> None:
    with psycopg.connect(postgresql_url) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
        connection.execute("CREATE SCHEMA penstock")
    assert "it holds tables of something else (bookmarks)" in _refused(postgresql_url)
    url = f"{postgresql_url}?options=-csearch_path%3Dpenstock"
    for _ in range(2):
        with Database.open(url) as db:
            store.insert_job(db, small_plan(1, (0,)))
            assert len(claim_some(db)) == 1


def test_a_missing_folder(tmp_path: Path) -> None:
    assert f"the folder {tmp_path / 'no'} does not exist" in _refused(
        f"sqlite:///{tmp_path}/no/x.db"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    assert "the file cannot be opened" in _refused(f"sqlite:///{tmp_path}")


@contextlib.contextmanager
def _without_rights() -> Iterator[None]:
    """Root may write everywhere: become nobody for a moment."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others may read but not write; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield folder
        folder.chmod(0o755)


def test_a_folder_without_write_permission(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    with _without_rights():
        message = _refused(f"sqlite:///{open_folder}/x.db")
    assert "the file cannot be opened" in message
    assert list(open_folder.iterdir()) == []


def test_a_file_without_write_permission(open_folder: Path) -> None:
    file = open_folder / "x.db"
    Database.open(f"sqlite:///{file}").close()
    size = file.stat().st_size
    file.chmod(0o444)
    open_folder.chmod(0o777)
    with _without_rights(), Database.open(f"sqlite:///{file}") as db:
        assert rows(db, "SELECT * FROM jobs") == []
        with pytest.raises(WorkerError, match=r"x\.db: it is read-only"):
            store.insert_job(db, small_plan())
    assert file.stat().st_size == size


def test_an_empty_file_without_write_permission(open_folder: Path) -> None:
    file = open_folder / "x.db"
    file.touch()
    file.chmod(0o444)
    open_folder.chmod(0o777)
    with _without_rights():
        assert "x.db: it is read-only" in _refused(f"sqlite:///{file}")
    assert file.stat().st_size == 0


def test_a_server_that_only_reads(postgresql_url: str) -> None:
    name = postgresql_url.rpartition("/")[2]
    forbid = f"ALTER DATABASE {name} SET default_transaction_read_only = on"
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        connection.execute(forbid)
    assert f"{name}: it is read-only" in _refused(postgresql_url)
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(forbid.replace("= on", "= off"))
    Database.open(postgresql_url).close()
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        connection.execute(forbid)
    with Database.open(postgresql_url) as db:
        with pytest.raises(WorkerError, match="it is read-only"):
            store.insert_job(db, small_plan())
        assert rows(db, "SELECT * FROM jobs") == []


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    with Database(database._engine(url)) as db:
        with db.read() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 3")
        with pytest.raises(WorkerError, match="the disk is full"):
            db.upgrade()
        assert rows(db, "SELECT * FROM sqlite_master") == []


@pytest.mark.parametrize(
    "url, said",
    [
        ("penstock.db", "got something that is no URL"),
        ("", "got something that is no URL"),
        ("mysql://u:secret@h/d", r"got mysql://u:\*\*\*@h/d"),
        ("sqlite://", "threads and processes share the file"),
        ("sqlite:///:memory:", "threads and processes share the file"),
        ("sqlite:///file:x?mode=memory&uri=true", "threads and processes share the file"),
    ],
)
def test_an_url_that_is_none_of_ours(url: str, said: str) -> None:
    with pytest.raises(WorkerError, match=said) as caught:
        Database.open(url)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there() -> None:
    message = _refused("postgresql://u:secret@127.0.0.1:1/d")
    assert message.startswith("postgresql+psycopg://u:***@127.0.0.1:1/d: connection failed")
    assert "secret" not in message


def test_a_connection_that_is_cut_is_one_error(postgresql_db: Database) -> None:
    """The next transaction has a fresh one."""
    db = postgresql_db
    store.insert_job(db, small_plan(1, (0,)))
    with pytest.raises(WorkerError), db.write() as tx:
        tx.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
    assert len(claim_some(db)) == 1
    (pid,) = rows(db, "SELECT pg_backend_pid()")[0]
    with Database.open(db.engine.url.render_as_string(hide_password=False)) as other:
        rows(other, f"SELECT pg_terminate_backend({pid})")
    assert claim_some(db) == []


def test_a_server_that_restarts(tmp_path: Path) -> None:
    with PostgresServer() as server, Database.open(server.url) as db:
        store.insert_job(db, small_plan(1, (0,)))
        (claimed,) = claim_some(db)
        server.kill()
        with pytest.raises(WorkerError, match="postgresql"):
            store.flush(db, [write(claimed, 0, (1,), "a")], lease_seconds=60)
        server.start()
        assert not store.flush(db, [write(claimed, 0, (1,), "a")], lease_seconds=60).lost
        assert rows(db, "SELECT text FROM chunks") == [("a",)]


def _with_migration(folder: Path, body: str) -> Path:
    """A copy of the migrations with one more that does this."""
    copy = folder / "migrations"
    shutil.copytree(migrations(), copy)
    (copy / "versions" / "9999_next.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n\n"
        f"revision, down_revision = '9999', '{SCHEMA}'\nbranch_labels = depends_on = None\n\n"
        f"def upgrade() -> None:\n    {body}\n"
    )
    return copy


def test_a_session_frozen_amid_a_transaction_holds_its_rows_no_longer_than_that(
    postgresql_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.insert_job(postgresql_db, small_plan(1, (0,)))
    monkeypatch.setattr(database, "IDLE_SECONDS", 1)
    url = postgresql_db.engine.url.render_as_string(hide_password=False)
    change = "UPDATE requests SET seed = seed + 1"
    went_on = False
    with Database.open(url) as frozen:
        with pytest.raises(WorkerError, match="postgresql"), frozen.write() as tx:
            tx.exec_driver_sql(change)
            # From here on it says nothing, like a process that was stopped.
            with postgresql_db.write() as other:
                other.exec_driver_sql("SET LOCAL lock_timeout = '30s'")
                other.exec_driver_sql(change)
            went_on = True
            tx.exec_driver_sql(change)
        assert went_on, "the rows stayed locked"
        seeds = rows(postgresql_db, "SELECT seed FROM requests")
        assert rows(frozen, "SELECT seed FROM requests") == seeds, "it goes on when it is back"
        run(frozen, change)
        ((before,), (after,)) = *seeds, *rows(postgresql_db, "SELECT seed FROM requests")
        assert after == before + 1


def test_how_long_a_session_may_be_idle_is_ours_unless_the_url_says_so(
    postgresql_url: str,
) -> None:
    name = "idle_in_transaction_session_timeout"
    with Database.open(postgresql_url) as db:
        assert rows(db, f"SHOW {name}") == [(f"{database.IDLE_SECONDS}s",)]
        assert rows(db, "SHOW default_transaction_isolation") == [("read committed",)]
    with Database.open(f"{postgresql_url}?options=-c%20{name}%3D77s") as db:
        assert rows(db, f"SHOW {name}") == [("77s",)]


def test_a_host_that_is_gone_without_a_word_is_noticed_unless_the_url_is_patient(
    postgresql_url: str,
) -> None:
    def told(url: str) -> dict[str, str]:
        with Database.open(url) as db, db.engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert raw is not None
            known = {line.keyword.decode(): line.val for line in raw.pgconn.info}
        return {name: (known[name] or b"").decode() for name in database.PATIENCE}

    assert told(postgresql_url) == {name: str(value) for name, value in database.PATIENCE.items()}
    assert told(f"{postgresql_url}?tcp_user_timeout=5000")["tcp_user_timeout"] == "5000"
