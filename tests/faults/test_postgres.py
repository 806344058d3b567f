"""PostgreSQL restarted, cut off, down and read-only; a network that resets, stalls and lies."""

import resource
import time
from collections.abc import Callable
from contextlib import ExitStack

import psycopg
import pytest

from tests.faults.conftest import MakeStage
from tests.faults.harness import LEASE_SECONDS, Stage, many
from tests.faults.invariants import Result
from tests.faults.tcp_proxy import TcpProxy
from tests.servers import PostgresServer, create_database

DOWN_SECONDS, LONG_DOWN_SECONDS = LEASE_SECONDS + 1.5, 30.0
Fault = Callable[[Stage, PostgresServer, float], None]


def immediate_restart(stage: Stage, server: PostgresServer, down: float) -> None:
    server.kill()
    server.start()


def terminated(stage: Stage, server: PostgresServer, down: float) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(_TERMINATE)


def away(stage: Stage, server: PostgresServer, down: float) -> None:
    server.kill()
    time.sleep(down)
    server.start()


def read_only(stage: Stage, server: PostgresServer, down: float) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
        time.sleep(down)
        connection.execute("SET default_transaction_read_only = off")
        connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
        connection.execute("SELECT pg_reload_conf()")


def too_many_open_files(stage: Stage, server: PostgresServer, down: float) -> None:
    """No worker can open one more file, and all must: their connections are gone."""
    assert stage.fleet is not None
    for worker in stage.fleet.workers:
        _, most = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (3, most))
    terminated(stage, server, down)
    time.sleep(down)
    for worker in stage.fleet.workers:
        if worker.code is None:
            resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (most, most))


FAULTS: dict[str, Fault] = {
    "PostgreSQL: immediate restart": immediate_restart,
    "PostgreSQL: all connections terminated": terminated,
    "PostgreSQL down": away,
    "PostgreSQL read-only": read_only,
    "too many open files": too_many_open_files,
}


def reset(stage: Stage, proxy: TcpProxy) -> None:
    proxy.reset()


def stall(stage: Stage, proxy: TcpProxy) -> None:
    proxy.stall()
    time.sleep(LEASE_SECONDS + 1)
    proxy.flow()


def slow(stage: Stage, proxy: TcpProxy) -> None:
    proxy.delay_seconds = 0.03
    time.sleep(3)
    proxy.delay_seconds = 0


def cut_after_commit(stage: Stage, proxy: TcpProxy) -> None:
    """Of a flush that wrote chunks: whether they are there is what nobody can know."""
    before, proxy.cuts = proxy.cut, 1
    stage.wait(lambda: not proxy.cuts or stage.keep_busy(), "COMMIT of chunks")
    assert proxy.cut == before + 1


NETWORK: dict[str, Callable[[Stage, TcpProxy], None]] = {
    "network: connections reset": reset,
    "network: stalled beyond the lease": stall,
    "network: slow": slow,
    "network: cut after COMMIT of chunks was sent": cut_after_commit,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_postgres(
    fault: str, make_stage: MakeStage, golden: Result, own_postgres: PostgresServer
) -> None:
    stage = make_stage(fault, create_database(own_postgres.url))
    _play(stage, golden, 1, lambda: FAULTS[fault](stage, own_postgres, DOWN_SECONDS))


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fault", FAULTS)
def test_postgres_many_times(
    fault: str, make_stage: MakeStage, golden: Result, own_postgres: PostgresServer
) -> None:
    stage = make_stage(fault, create_database(own_postgres.url))
    times = many(10 if "files" in fault or "read-only" in fault else 30)
    down = LONG_DOWN_SECONDS if fault == "PostgreSQL down" else DOWN_SECONDS
    _play(stage, golden, times, lambda: FAULTS[fault](stage, own_postgres, down))


@pytest.mark.parametrize("fault", NETWORK)
def test_network(fault: str, make_stage: MakeStage, golden: Result, postgres_url: str) -> None:
    _through_proxy(fault, make_stage, golden, postgres_url, 3 if "COMMIT" in fault else 1)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fault", NETWORK)
def test_network_twenty_times(
    fault: str, make_stage: MakeStage, golden: Result, postgres_url: str
) -> None:
    _through_proxy(fault, make_stage, golden, postgres_url, many(20))


def _through_proxy(
    fault: str, make_stage: MakeStage, golden: Result, postgres_url: str, times: int
) -> None:
    """The workers come to the database by way of the proxy, everybody else directly."""
    direct = create_database(postgres_url)
    port = int(postgres_url.rpartition(":")[2].partition("/")[0])
    with ExitStack() as stack:
        proxy = stack.enter_context(TcpProxy(port))
        by_proxy = direct.replace(f":{port}/", f":{proxy.port}/")
        stage = make_stage(fault, direct, worker_url=by_proxy)
        _play(stage, golden, times, lambda: NETWORK[fault](stage, proxy))


def _play(stage: Stage, golden: Result, times: int, fault: Callable[[], None]) -> None:
    stage.submit()
    with stage.working(2):
        for _ in range(times):
            stage.amid_work(stage.rng.randrange(20, 150))
            fault()
            stage.fault()
        stage.finish()
    stage.check(golden)


_TERMINATE = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"""
