"""The systems that take turns, by name: ours in this process, each peer in one of its own.

Knows how each is started and at which precision the same weights lie in which folder. Knows
nothing of kinds of work, rounds or tables.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ours import Ours, loaded
from peers import PeerProcess
from turns import System

from orchestrator.settings import Settings

HERE = Path(__file__).parent
MODELS = HERE / "models"
PEER_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
ENGINE, SAMPLED = "engine", "engine, sampled"
PRECISIONS = ("fp32", "w8a8", "int4")

GENAI, GENAI_ENGINE = "genai", "genai Engine"
LLAMA, LLAMA_COPIED = "llama.cpp", "llama.cpp, copied"
STATIC, CONTINUOUS = "transformers", "transformers, continuous"


@dataclass(frozen=True, slots=True)
class Kind:
    """A peer's script, its folder of the model, and the words it is started with."""

    script: str
    form: Mapping[str, str]
    words: Mapping[str, tuple[str, ...]]
    file: str = ""


# llama.cpp keeps KV in 16 bits unless told otherwise; the others in float32 where weights are.
# transformers has neither 4 bits nor 8 on the CPU: bfloat16 is the nearest that it computes with.
_KINDS = {
    "genai": Kind(
        "genai_peer.py",
        {"fp32": "fp32", "w8a8": "w8a8", "int4": "int4"},
        dict.fromkeys(PRECISIONS, ("--rows", "16")),
    ),
    "llama": Kind(
        "llama_peer.py",
        {"fp32": "f32", "w8a8": "q8_0", "int4": "q4_0"},
        {"fp32": ("--kv", "f32"), "w8a8": ("--kv", "f16"), "int4": ("--kv", "f16")},
        file="model.gguf",
    ),
    "transformers": Kind(
        "transformers_peer.py",
        dict.fromkeys(PRECISIONS, "hf"),
        {"fp32": ("--dtype", "fp32"), "w8a8": ("--dtype", "bf16"), "int4": ("--dtype", "bf16")},
    ),
}
_MODES = {
    GENAI: ("genai", "static"),
    GENAI_ENGINE: ("genai", "engine"),
    LLAMA: ("llama", "independent"),
    LLAMA_COPIED: ("llama", "copied"),
    STATIC: ("transformers", "static"),
    CONTINUOUS: ("transformers", "continuous"),
}


PEERS = {name: peer for name, (peer, _) in _MODES.items()}
"""By the name of a system, the peer whose mode it is."""


@dataclass
class Fleet:
    """What is there to take turns with one model: ours, and the peers' modes by name."""

    ours: Ours
    precision: str
    peers: dict[str, System] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@contextmanager
def fleet(
    shape: str, precision: str, names: set[str], threads: int, settings: Settings
) -> Iterator[Fleet]:
    """Ours, and those of `names` whose environment and files are there; the rest is said."""
    model = shape if shape == "tiny" else str(_folder(shape, precision))
    with ExitStack() as stack:
        found = Fleet(stack.enter_context(loaded(model, settings)), precision)
        for peer, kind in _KINDS.items():
            wanted = {n: mode for n, (of, mode) in _MODES.items() if of == peer and n in names}
            folder = _folder(shape, kind.form[precision])
            if not wanted:
                continue
            if not (PEER_PYTHON.is_file() and folder.is_dir()):
                print(f"no {peer}: {PEER_PYTHON} or {folder} is not there", file=sys.stderr)
                continue
            words = (str(folder / kind.file), "--threads", str(threads), *kind.words[precision])
            process = PeerProcess(PEER_PYTHON, HERE / kind.script, *words)
            stack.callback(process.close)
            found.versions |= process.versions
            found.peers |= {n: partial(process.turn, mode) for n, mode in wanted.items()}
        yield found


def _folder(shape: str, form: str) -> Path:
    return MODELS / f"{shape}-{form}"
