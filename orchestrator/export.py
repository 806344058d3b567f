"""Results to JSON Lines: one ended request a line, in the order of item and point.

A line's `completion` is folded from the stored chunks, as a reader of the stream would fold them,
so that an export equals a replay. Files are written beside their place and renamed when whole.
Knows nothing of terminals; `-`, and what to say of progress, is the caller's business.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

from orchestrator.db.columns import to_json
from orchestrator.db.replay import envelope_of
from orchestrator.db.views import Result
from orchestrator.errors import PenstockError, SpecError
from orchestrator.spec.chunks import ChoiceEnd, Json, fold, stream, usage
from orchestrator.spec.plan import given

# Characters that JSON lets through and that some readers take for the end of a line.
_LINE_ENDS = ("\x85", "\u2028", "\u2029")


def export(results: Iterable[Result], out: TextIO, said: Callable[[int], None]) -> int:
    """Write a line for each result, telling `said` the count after each; the number of lines."""
    count = 0
    for count, result in enumerate(results, start=1):
        out.write(_one_line(to_json(line(result))) + "\n")
        said(count)
    return count


def line(result: Result) -> Json:
    """One result as plain JSON values.

    `completion` is a `chat.completion`, or null with `error` {code, message}; `scores` holds a
    list per grader, one score per choice, null where there is none; `usage` counts over all
    attempts, with the tokens that were computed a second time.
    """
    succeeded = result.state == "succeeded"
    return {
        "custom_id": result.custom_id,
        "job": {"id": result.job_id, "name": result.job_name},
        "item": dict(result.columns),
        "point": dict(result.point_params),
        "request_id": result.request_id,
        "seed": result.seed,
        "user": result.user,
        "state": result.state,
        "completion": completion(result) if succeeded else None,
        "error": None if succeeded else _error(result),
        "usage": asdict(result.usage) if result.usage else None,
        "scores": {
            grader: [scores.get(choice.choice) for choice in result.choices]
            for grader, scores in result.scores.items()
        },
    }


def completion(result: Result) -> Json:
    """The request's chunks folded into a `chat.completion`, with usage whether asked for or not."""
    envelope = envelope_of(
        result.request_id,
        job_id=result.job_id,
        created=result.created,
        model=result.model,
        params=given(result.params, result.point_params, result.columns, verbatim=result.verbatim),
        system_fingerprint=result.system_fingerprint,
        warnings=result.warnings,
    )
    chunks = (chunk for choice in result.choices for chunk in choice.chunks)
    ends = (ChoiceEnd(c.choice, c.finish_reason) for c in result.choices if c.finish_reason)
    return fold(stream(replace(envelope, include_usage=True), chunks, ends, _usage(result)))


def _usage(result: Result) -> Json | None:
    if result.usage is None:
        return None
    spent = result.usage
    return usage(spent.prompt_tokens, spent.completion_tokens, spent.cached_tokens)


def _one_line(text: str) -> str:
    if not text.isascii():
        for character in _LINE_ENDS:
            text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _error(result: Result) -> dict[str, str]:
    code, message = result.error or ("cancelled", "the request was cancelled")
    return {"code": code, "message": message}


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that appears at `path` when the block ends well, whole and on disk, or never.

    What stood there before is replaced. A device or pipe is written straight. Raises SpecError
    where there is no such folder, PenstockError where writing fails.
    """
    path = path.resolve()
    if path.is_dir() or not path.parent.is_dir():
        raise SpecError(str(path), "a file in a folder that exists", "none")
    with _said_plainly(str(path)):
        if path.exists() and not path.is_file():
            with path.open("w", encoding="utf-8", newline="\n") as out:
                yield out
            return
        with _beside(path) as out:
            yield out


@contextmanager
def open_stream(out: TextIO, name: str) -> Iterator[TextIO]:
    """A stream that is open already, flushed at the end; PenstockError where writing fails."""
    with _said_plainly(name):
        yield out
        out.flush()


@contextmanager
def _said_plainly(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # the reader has left, which is no error
    except OSError as error:
        raise PenstockError(f"cannot write {name}: {error.strerror or error}") from error


@contextmanager
def _beside(path: Path) -> Iterator[TextIO]:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The new name itself on disk, where folders can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
