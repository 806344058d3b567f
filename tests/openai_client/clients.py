"""OpenAI's own client in two versions, and how its completions compare with ours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.openai_client.server import Streams, playing

ROOT = Path(__file__).parents[2]
PYTHONS = {"newest": Path(sys.executable), "1.40": ROOT / ".venv-openai-1.40/bin/python"}
Json = dict[str, Any]


def accumulated(version: str, streams: Streams) -> dict[str, Json]:
    """What that version of the client makes of each stream; see `accumulate.py`."""
    python = PYTHONS[version]
    assert python.exists(), f"{python} is not there: run `make .venv-openai-1.40/installed`"
    with playing(streams) as url:
        done = subprocess.run(
            [python, Path(__file__).with_name("accumulate.py"), url],
            input="\n".join(streams),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(streams, lines, strict=True))


def plain(completion: Json) -> Json:
    """The client's completion without what it adds of its own: what it parsed, the calls' places,
    and nulls and empty lists for what a message does not have."""
    choices = [{**choice, "message": _plain(choice["message"])} for choice in completion["choices"]]
    return {**completion, "choices": choices}


def _plain(message: Json) -> Json:
    always = ("content", "refusal")
    message = {k: value for k, value in message.items() if k in always or value not in (None, [])}
    message.pop("parsed", None)
    for place, call in enumerate(message.get("tool_calls", ())):
        assert call.pop("index") == place
        call["function"].pop("parsed_arguments", None)
    return message
