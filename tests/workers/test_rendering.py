"""Foreign templates against their limits: what they do to the child, and never to the worker."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import WorkerError
from workers.running.memory import resident_bytes
from workers.words import rendering
from workers.words.rendering import Renderer, RenderError
from workers.words.sandbox import Limits

NOON = datetime(2024, 8, 6, 12, tzinfo=UTC)
MIB = 2**20
TIGHT = Limits(seconds=0.5, memory_bytes=200 * MIB, characters=1_000_000)
GOOD = "{{ text }}"
NUMBERS = {"million": 10**6, "billion": 10**9}
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")


def pid_of(renderer: Renderer) -> int:
    child = renderer._child
    assert child is not None
    return child._process.pid


def running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has waited for yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(true: Callable[[], bool]) -> None:
    while not true():  # pytest's own timeout ends it
        time.sleep(0.01)


@pytest.fixture
def good() -> Iterator[Renderer]:
    renderer = Renderer([GOOD], TIGHT)
    yield renderer
    renderer.close()


# --- what a template may try ----------------------------------------------------------------------

TIME, MEMORY, OUTPUT = "takes more than 0.5 s", "needs more than 200 MiB", "exceeds 1000000 char"
GROWS = "{% set n = namespace(x=X) %}{% for _ in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
REFUSED = {
    "{{ 'a' * million * 2 }}": OUTPUT,
    "{{ 'a' * billion }}": MEMORY,
    "{{ '%*d' % (billion, 1) }}": MEMORY,
    "{{ '{:>{}}'.format(1, billion) }}": MEMORY,
    "{{ '' | center(billion) }}": MEMORY,
    "{{ [1] | tojson(indent=billion) }}": MEMORY,
    "{{ [[]] * billion }}": MEMORY,
    GROWS.replace("X", "'ab'"): MEMORY,
    GROWS.replace("X", "[1]"): MEMORY,
    "{% macro m() %}" + LOOPS.replace("{% endfor %}", "xxxxxxxx{% endfor %}", 1) + "{% endmacro %}"
    "{{ m() }}": f"{MEMORY}|{TIME}",
    LOOPS: TIME,
    LOOPS.replace("{% endfor %}", "x{% endfor %}", 1): f"{OUTPUT}|{TIME}",
    "{{ million ** million }}": TIME,
    "{{ (million ** 999) | string | length }}": "digits",
    "{% for x in range(99999) | map('string') | batch(1) | sort %}{% endfor %}" * 500: TIME,
    "{{ range(billion) | list }}": "Range too big",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}": "recursion",
    "{{ raise_exception('no' * million) }}": r"^(no){1000}$",
    "{{ raise_exception.__globals__.sys }}": "unsafe",
    "{{ dict.fromkeys }}{{ dict.mro() }}": "no attribute",
    "{{ namespace(__class__=1) }}": "underscore",
    "{% set n = namespace(x=1) %}{% set n._y = 2 %}": "underscore",
}


@pytest.mark.parametrize("hostile", REFUSED, ids=range(len(REFUSED)))
def test_a_hostile_template_is_refused_and_the_next_rendering_works(hostile: str) -> None:
    said = REFUSED[hostile]
    limits = TIGHT if TIME in said else replace(TIGHT, seconds=10)  # else a slow machine decides
    renderer, before = Renderer([hostile, GOOD], limits), resident_bytes()
    for _ in range(2):
        with pytest.raises(RenderError, match=said):
            renderer.render(0, NUMBERS, NOON)
        assert renderer.render(1, {"text": "good"}, NOON) == "good"
    assert resident_bytes() - before < 50 * MIB
    renderer.close()


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        ("{{ 9 ** (9 ** 9) }}", TIME),
        ("{{ 'a' * 10 ** 9 * 9 }}" + "{{ 'a' * 10 ** 8 }}" * 9, MEMORY),
        ("{{ " + "(" * 100_000 + ")" * 100_000 + " }}", "recursion"),
        ("{{ " + "[" * 3_000 + "]" * 3_000 + " }}", "recursion"),
        ("{% if true %}" * 3_000 + "{% endif %}" * 3_000, "."),
        ("{% if %}", "Expected an expression"),
    ],
    ids=["power", "text", "parentheses", "lists", "blocks", "syntax"],
)
def test_a_template_that_cannot_be_compiled_is_refused_at_once(hostile: str, said: str) -> None:
    with pytest.raises(RenderError, match=said):
        Renderer([hostile], TIGHT if said == TIME else replace(TIGHT, seconds=10))


def test_what_is_rendered_within_the_limits_is_what_was_written(good: Renderer) -> None:
    for text in ("", "é 🚀 \0 \x7f \u2028", "\ud83d", "\ud83d\ude00", "\ude00\ud83d", "x" * 10**6):
        assert good.render(0, {"text": text}, NOON) == text
    with pytest.raises(RenderError, match="exceeds 1000000 characters"):
        good.render(0, {"text": "x" * (10**6 + 1)}, NOON)
    with pytest.raises(RenderError, match="no plain JSON"):
        good.render(0, {"text": {1, 2}}, NOON)


def test_chance_says_the_same_in_every_process() -> None:
    said = set()
    for _ in range(2):
        renderer = Renderer(["{{ range(99999) | random }} {{ lipsum(2) }}"], TIGHT)
        said |= {renderer.render(0, {}, NOON) for _ in range(2)}
    assert len(said) == 1


# --- the process ----------------------------------------------------------------------------------


def test_threads_share_a_renderer_and_each_gets_its_own_text(good: Renderer) -> None:
    texts, child = [f"{i} " * (i * 97 % 5_000) for i in range(400)], good._child
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: good.render(0, {"text": text}, NOON), texts)) == texts
    assert good._child is child  # nothing was mixed up and then tried again


@linux
def test_signals_for_the_worker_do_not_end_its_child(good: Renderer) -> None:
    pid = pid_of(good)
    assert os.getsid(pid) == pid  # the terminal's signals do not reach it at all
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
        assert good.render(0, {"text": "still here"}, NOON) == "still here"
    assert pid_of(good) == pid


@linux
def test_a_child_that_was_killed_costs_no_rendering(good: Renderer) -> None:
    pid = pid_of(good)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not running(pid))
    assert good.render(0, {"text": "again"}, NOON) == "again"
    assert pid_of(good) != pid


@linux
def test_the_child_knows_nothing_of_the_workers_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENSTOCK_DATABASE_URL", "postgresql://u:secret@h/d")
    renderer = Renderer([GOOD], TIGHT)
    assert b"secret" not in Path(f"/proc/{pid_of(renderer)}/environ").read_bytes()


@linux
def test_the_child_ends_with_close_and_with_its_renderer() -> None:
    closed, dropped = Renderer([GOOD], TIGHT), Renderer([GOOD], TIGHT)
    pids = pid_of(closed), pid_of(dropped)
    closed.close()
    del dropped
    gc.collect()
    assert not any(map(running, pids))
    assert closed.render(0, {"text": "anew"}, NOON) == "anew"


PARENT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from datetime import UTC, datetime
from workers.words.rendering import Renderer
from workers.words.sandbox import Limits
renderer = Renderer([sys.argv[1]], Limits(seconds=2))
print(renderer._child._process.pid, flush=True)
print(renderer.render(0, {{"text": "rendered"}}, datetime.now(UTC)), flush=True)
sys.stdin.read()
"""


@linux
@pytest.mark.parametrize("template", [GOOD, LOOPS], ids=["idle", "at work"])
def test_the_child_ends_when_the_worker_is_killed(template: str) -> None:
    command = [sys.executable, "-c", PARENT, template]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if template == GOOD:
            assert parent.stdout.readline() == b"rendered\n"
        else:
            wait_until(lambda: processor_seconds(pid) > 0.5)
        assert running(pid)
        parent.kill()
        wait_until(lambda: not running(pid))


def test_it_starts_from_any_folder_and_from_an_isolated_interpreter(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the working directory')")
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").write_text("raise SystemExit('not ours')")
    gone = "import os, tempfile; os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd())\n"
    libraries = f"import sys; sys.path += {[path for path in sys.path if path]!r}\n"
    bare = getattr(sys, "_base_executable", sys.executable)  # has no libraries of its own
    for python, program in (
        (sys.executable, PARENT),
        (sys.executable, gone + PARENT),
        (bare, libraries + PARENT),
    ):
        ended = subprocess.run(
            [python, "-I", "-c", program, GOOD],
            cwd=tmp_path,
            input="",
            capture_output=True,
            text=True,
        )
        assert ended.stdout.splitlines()[1:] == ["rendered"], ended.stderr
        assert ended.stderr == ""


# --- a child that does not answer as it should ----------------------------------------------------


BROKEN = """
import os, socket, time
from workers.words import sandbox
connection = socket.socket(fileno=0)
sandbox.receive(connection, 2**20)
sandbox.send(connection, sandbox.DONE)
sandbox.receive(connection, 2**20)
"""


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("os._exit(3)", "its process ended with exit code 3"),
        ("os.abort()", "its process ended with exit code -6"),
        ("connection.sendall(b'\\xff' * 8); time.sleep(99)", "expected at most"),
        ("sandbox.send(connection, b'+\\xff'); time.sleep(99)", "invalid start byte"),
        ("sandbox.send(connection, b'?'); time.sleep(99)", "is no answer: no answer"),
        ("connection.sendall(b'\\0\\0'); time.sleep(99)", "takes more than 0.1 seconds"),
    ],
)
def test_a_child_that_breaks_is_the_templates_fault_when_two_break(
    monkeypatch: pytest.MonkeyPatch, does: str, said: str
) -> None:
    started = []

    def broken(theirs: Any) -> Any:
        command = [sys.executable, "-c", BROKEN + does]
        started.append(subprocess.Popen(command, stdin=theirs.fileno(), stderr=subprocess.DEVNULL))
        return started[-1]

    monkeypatch.setattr(rendering, "_process", broken)
    renderer = Renderer([GOOD], Limits(seconds=0.1))
    with pytest.raises(RenderError, match=said):
        renderer.render(0, {}, NOON)
    renderer.close()
    assert len(started) == (1 if "takes" in said else 2)
    assert all(process.returncode is not None for process in started)


def test_a_machine_that_starts_no_process_is_no_fault_of_the_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(theirs: Any) -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    def ends(theirs: Any) -> Any:
        return subprocess.Popen([sys.executable, "-c", "exit(7)"], stdin=theirs.fileno())

    for start, said in ((fails, "temporarily unavailable"), (ends, "exit code 7")):
        monkeypatch.setattr(rendering, "_process", start)
        with pytest.raises(WorkerError, match=said) as caught:
            Renderer([GOOD])
        assert caught.value.code == "model"


def test_an_interrupted_rendering_leaves_no_answer_to_the_next(
    good: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rendering, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            good.render(0, {"text": "first"}, NOON)
    assert good.render(0, {"text": "second"}, NOON) == "second"


def test_a_render_waits_for_no_other_renderer(good: Renderer) -> None:
    slow = Renderer([LOOPS], Limits(seconds=30))
    failed: list[str] = []

    def stall() -> None:
        try:
            slow.render(0, {}, NOON)
        except RenderError as error:
            failed.append(str(error))

    thread = threading.Thread(target=stall)
    thread.start()
    assert good.render(0, {"text": "meanwhile"}, NOON) == "meanwhile"
    assert not failed
    while thread.is_alive():  # both of its children, however soon it starts the second
        os.kill(pid_of(slow), signal.SIGKILL) if slow._child else None
        thread.join(0.05)
    assert "ended with exit code -9" in failed[0]
    slow.close()
