"""Fixtures for every room: databases, each test its own, on SQLite and on PostgreSQL."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.db.database import Database
from tests.servers import PostgresServer, create_database, drop_database

# A shell without job control starts what it puts in the background with SIGINT ignored, and so
# would be every process that the tests start: those that press Ctrl-C need its default back.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server in which tests make databases: TEST_POSTGRES_URL, or one started here."""
    if url := os.environ.get("TEST_POSTGRES_URL"):
        yield url
        return
    with PostgresServer() as server:
        yield server.url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """Where a SQLite database may be made."""
    return f"sqlite:///{tmp_path / 'penstock.db'}"


@pytest.fixture
def postgresql_url(postgres_url: str) -> Iterator[str]:
    """A PostgreSQL database without any table."""
    url = create_database(postgres_url)
    yield url
    drop_database(postgres_url, url)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database without any table; the test runs once on each kind."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the schema, to be copied: migrating takes longer than many a test."""
    file = tmp_path_factory.mktemp("template") / "penstock.db"
    Database.open(f"sqlite:///{file}").close()
    return file


@pytest.fixture(scope="session")
def postgresql_template(postgres_url: str) -> Iterator[str]:
    """The same on PostgreSQL, by its URL."""
    url = create_database(postgres_url)
    Database.open(url).close()
    yield url
    drop_database(postgres_url, url)


@pytest.fixture
def sqlite_db(sqlite_template: Path, sqlite_url: str, tmp_path: Path) -> Iterator[Database]:
    """An open SQLite database with the schema, for tests in which the kind does not matter."""
    shutil.copy(sqlite_template, tmp_path / "penstock.db")
    with Database.open(sqlite_url) as opened:
        yield opened


@pytest.fixture
def postgresql_db(postgres_url: str, postgresql_template: str) -> Iterator[Database]:
    """An open PostgreSQL database with the schema, for what SQLite does not have."""
    url = create_database(postgres_url, template=postgresql_template)
    with Database.open(url) as opened:
        yield opened
    drop_database(postgres_url, url)


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request: pytest.FixtureRequest) -> Database:
    """An open database with the schema; the test runs once on each kind."""
    opened = request.getfixturevalue(f"{request.param}_db")
    assert isinstance(opened, Database)
    return opened
