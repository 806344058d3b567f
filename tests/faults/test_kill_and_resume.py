"""kill -9 of `penstock run` at random times: run again, it ends with the tokens it would have had.

The job holds what is easy to get wrong: prompts that make half emoji, stop strings that are held
back, several choices, log-probabilities, penalties. Each kill waits until the attempt has
persisted something new, so it lands in the middle of work.
"""

import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.harness import job_text, many
from tests.faults.invariants import LAWS
from tests.faults.processes import Launcher, Process

INVARIANTS = LAWS | {
    "the text is the chunks' text": """
        SELECT count(*) FROM choices c WHERE text <> (SELECT coalesce(group_concat(t, ''), '') FROM
            (SELECT k.text AS t FROM chunks k WHERE k.request_id = c.request_id
             AND k.choice = c.choice ORDER BY k.token_start))""",
    "every request succeeded": "SELECT count(*) FROM requests WHERE state <> 'succeeded'",
    "every choice has its end": "SELECT count(*) FROM choices WHERE finish_reason IS NULL",
}


ENV = {"PENSTOCK_FLUSH_SECONDS": "0.02", "PENSTOCK_SLOTS": "6", "PENSTOCK_THREADS": "1"}


class Run:
    """`penstock run job.yaml --resume` in a folder of its own."""

    def __init__(self, folder: Path, launcher: Launcher) -> None:
        self.folder, self.launcher = folder, launcher
        self.database = folder / "penstock.db"

    def start(self) -> Process:
        argv, log = ("run", "job.yaml", "--resume"), self.folder / "log"
        return self.launcher.start(*argv, env=ENV, cwd=self.folder, log=log)

    def finish(self) -> None:
        process = self.start()
        assert process.wait(240) == 0, process.said()

    def query(self, sql: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self.database, timeout=30)) as connection:
            return connection.execute(sql).fetchall()

    def tokens(self) -> int:
        try:
            return int(str(self.query("SELECT coalesce(sum(n_tokens), 0) FROM choices")[0][0]))
        except sqlite3.OperationalError:
            return 0

    def is_over(self) -> bool:
        """Nothing is left to do: with --resume the next run would begin a new job."""
        return self.query("SELECT count(*) FROM requests WHERE finished_at IS NULL") == [(0,)]

    def result(self) -> dict[tuple[object, ...], tuple[object, ...]]:
        rows = self.query("""
            SELECT r.item_id % 1000000000, r.point_id % 1000000000, c.choice, r.seed,
                   c.n_tokens, c.finish_reason, c.text,
                   (SELECT group_concat(hex(token_ids), '') FROM (SELECT token_ids FROM chunks k
                    WHERE k.request_id = r.id AND k.choice = c.choice ORDER BY token_start)),
                   (SELECT group_concat(substr(logprobs, 2, length(logprobs) - 2), ',') FROM
                    (SELECT logprobs FROM chunks k WHERE k.request_id = r.id
                     AND k.choice = c.choice AND logprobs IS NOT NULL ORDER BY token_start))
            FROM requests r JOIN choices c ON c.request_id = r.id""")
        return {row[:3]: row[3:] for row in rows}


def kill_amid_work(run: Run, rng: random.Random) -> bool:
    """Start, wait for new tokens, kill; False if the job was done before."""
    before, process = run.tokens(), run.start()
    deadline = time.monotonic() + 60
    while run.tokens() == before and process.code is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.15))
    process.kill()
    return process.code == -signal.SIGKILL


def check(run: Run, golden: Run) -> None:
    for law, sql in INVARIANTS.items():
        assert run.query(sql) == [(0,)], law
    assert run.result() == golden.result()


def storm(tmp_path: Path, launcher: Launcher, kills: int, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    job = job_text(seed, 8, max_tokens=90, n=3)
    folders = [tmp_path / "golden", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        (folder / "job.yaml").write_text(job, encoding="utf-8")
    golden, killed = (Run(folder, launcher) for folder in folders)
    golden.finish()
    done = 0
    while done < kills:
        done += kill_amid_work(killed, rng)
        if killed.is_over():
            check(killed, golden)
            for file in killed.folder.glob("penstock.db*"):
                file.unlink()
    killed.finish()
    check(killed, golden)
    ((replayed, attempts),) = killed.query("SELECT sum(replayed_tokens), max(attempt) FROM usage")
    print(f"{done} kills; the last job replayed {replayed} tokens in {attempts} attempts at most")


@pytest.mark.timeout(900)
def test_fifty_kills_change_no_token(tmp_path: Path, launcher: Launcher) -> None:
    storm(tmp_path, launcher, kills=50, seed=random.randrange(2**32))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_thousand_kills_change_no_token(tmp_path: Path, launcher: Launcher) -> None:
    storm(tmp_path, launcher, kills=many(1000), seed=random.randrange(2**32))
