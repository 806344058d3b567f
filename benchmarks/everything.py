"""Everything on: sampling with penalties and logprobs, chunks flushed; beside bare greedy steps.

The same prompts for the bare engine and for the whole path on SQLite and on PostgreSQL, each of
which waits for the disk at every COMMIT. The second table says where the time goes.
"""

import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from loads import Size
from ours import Ours
from report import Figures, figures
from turns import System, Turn, take_turns
from whole_path import EVERYTHING, GREEDY, Texts, WholePath, shares

from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.terminal import print_table
from workers.drawing.sampler import Sampling

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the servers stand in tests/
from tests.servers import PostgresServer, create_database

AIM = 0.92
BARE, SAMPLED = "engine", "engine, everything on"
GREEDY_SQLITE = "whole path, greedy, SQLite"
FULL_SQLITE, FULL_POSTGRES = "everything on, SQLite", "everything on, PostgreSQL"
SAMPLING = Sampling(
    temperature=1,
    top_p=0.95,
    frequency_penalty=0.5,
    presence_penalty=0.5,
    logprobs=True,
    top_logprobs=5,
)


def everything(
    ours: Ours,
    size: Size,
    rows: int,
    seeds: Sequence[int],
    others: float,
    settings: Settings,
    folder: Path,
    *,
    reduced: bool,
) -> Figures:
    """One round for each of `seeds` but the last; databases come and go in `folder`."""
    texts = Texts()
    works = [texts.work(ours, size, rows, seed) for seed in seeds]
    folder.mkdir(parents=True, exist_ok=True)
    with _paths(ours, texts, settings, folder) as paths:
        sampled = ours.another()
        systems: dict[str, System] = {BARE: ours.greedy, SAMPLED: lambda w: sampled(w, _sampling)}
        rounds = take_turns(systems | paths, works, others, warm=works.pop())
    return figures(
        f"everything, {size.prompts} prompts of {size.length} tokens, {size.new} new, {rows} rows; "
        f"{len(works)} rounds",
        rounds,
        lambda turn: turn.rate,
        {FULL_SQLITE: AIM, FULL_POSTGRES: AIM},
        reduced=reduced,
        facts={"work": "everything", "where it goes": where(rounds)},
        inverse=True,
    )


def _sampling(request: int) -> Sampling:
    return SAMPLING


@contextmanager
def _paths(
    ours: Ours, texts: Texts, settings: Settings, folder: Path
) -> Iterator[dict[str, System]]:
    """The whole path with everything on both databases, and greedy on SQLite."""
    server = PostgresServer()
    server._settings = {"fsync": "on"}  # the tests' servers do without
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as work,
        server,
        closing(Queue(settings)) as queue,
    ):
        place = Path(work).resolve()
        path = partial(WholePath, ours, texts, settings, queue, place)

        def sqlite() -> str:
            return f"sqlite:///{place / f'{random.getrandbits(48):x}.db'}"

        yield {
            GREEDY_SQLITE: path(GREEDY, sqlite),
            FULL_SQLITE: path(EVERYTHING, sqlite),
            FULL_POSTGRES: path(EVERYTHING, lambda: create_database(server.url)),
        }


def where(rounds: Sequence[Mapping[str, Turn]]) -> dict[str, dict[str, dict[str, float]]]:
    """By system and part: median seconds, calls, decode steps."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in rounds[0]:
        turns = [each[name] for each in rounds]
        found[name] = {}
        for part in shares(turns[0]):
            found[name][part] = {
                "seconds": statistics.median(shares(turn).get(part, 0.0) for turn in turns),
                "calls": statistics.median(turn.watch.calls.get(part, 0) for turn in turns),
                "steps": statistics.median(turn.watch.calls.get("decode", 0) for turn in turns),
            }
    return found


def print_where(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Milliseconds by part: of the turn, by decode step, and by call."""
    rows = []
    for name, parts in found.items():
        for part, each in parts.items():
            ms, calls = 1e3 * each["seconds"], each["calls"]
            by_call = [f"{calls:.0f}", f"{ms / calls:.2f}"] if calls else ["", ""]
            rows.append([name, part, f"{ms:.0f}", f"{ms / each['steps']:.2f}", *by_call])
    header = ("where it goes", "part", "ms", "ms/step", "calls", "ms/call")
    print_table(header, rows, left=2)
