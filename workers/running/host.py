"""The host as a place to compute on: an onnxruntime session on its CPU, and what errors mean.

A device has the same surface (device.py). Knows nothing of rows, prompts or sampling.
"""

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from orchestrator.errors import WorkerError
from workers.folders.row_quantized import ROW_PRODUCT, probe
from workers.running.feeds import SPARE, HostFeeds
from workers.running.kv import HostMemory
from workers.running.memory import free_bytes
from workers.running.pages import use_large_pages

RUNTIME_VERSION = str(ort.__version__)


class Host:
    """One session on the CPU. `grain`, `invariant`: chunks may begin anywhere, and a row's numbers
    are the same whoever else is in the batch (tests/workers/test_runner_laws.py)."""

    grain = 1
    invariant = True

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self._head_size = 0
        self._part = ort.RunOptions()
        self._part.only_execute_path_to_fetches = True

    @classmethod
    def open(cls, graph: bytes, *, weights: Path, threads: int, spinning: bool) -> "Host":
        """A session of the prepared `graph`, its external data in the folder `weights`.

        Raises WorkerError "model" with what onnxruntime says.
        """
        if ROW_PRODUCT.encode() in graph:
            _check_row_products()
        session = open_session(graph, threads=threads, spinning=spinning, weights=weights)
        use_large_pages()
        return cls(session)

    @property
    def line(self) -> str:
        """What this session really runs on, for people."""
        provider = self.session.get_providers()[0].removesuffix("ExecutionProvider")
        return f"onnxruntime {RUNTIME_VERSION}, {provider} provider"

    def memory(
        self,
        kinds: Mapping[str, str],
        present: Mapping[str, str],
        rows: int,
        heads: int,
        length: int,
        size: int,
        room: int | None,
    ) -> HostMemory:
        """The rows' KV; raises WorkerError "memory"."""
        self._head_size, length = size, length + SPARE
        return HostMemory(
            kinds, present, rows=rows, heads=heads, length=length, size=size, room=room
        )

    def feeds(self, rows: int, width: int, vocab: int, kind: str, positions: bool) -> HostFeeds:
        """The small inputs and the logits, for the memory made last."""
        return HostFeeds(rows, self._head_size, vocab, kind, positions)

    def free_bytes(self) -> int:
        """Memory that this process may still take."""
        return free_bytes()

    def padded(self, batch: int, slots: int) -> int:
        """Rows that a decode call of `batch` rows computes."""
        return batch

    def run(self, binding: ort.IOBinding, batch: int | None) -> None:
        """One call; `batch`: a decode step of so many rows, None: prompts. Raises WorkerError."""
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises its own C++ classes, one for each status
            raise failure(error) from error

    def run_part(self, binding: ort.IOBinding) -> None:
        """A call without its logits: what only they need, the language head, is not computed."""
        try:
            self.session.run_with_iobinding(binding, self._part)
        except Exception as error:
            raise failure(error) from error


def _check_row_products() -> None:
    """Raises WorkerError "model" where products of 8 bits are not exact on this processor."""
    graph, rows, expected = probe()
    found = open_session(graph, threads=1).run(None, {"q": rows})[0]
    if not (found == expected).all():
        raise WorkerError(
            "model",
            "w8a8 is not exact on this processor, which has no instructions for sums of products "
            "of 8 bits (VNNI, AMX, or their like): import the model with --precision int4 or int8",
        )


def open_session(
    graph: bytes, *, threads: int, spinning: bool = True, weights: Path | None = None
) -> ort.InferenceSession:
    """A session of `graph` on the CPU; its external data lies in the folder `weights`.

    Raises WorkerError "model" with what onnxruntime says.
    """
    try:
        return ort.InferenceSession(
            graph, session_options(threads, spinning, weights), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime raises its own C++ classes, one for each status
        raise WorkerError("model", f"onnxruntime refuses it: {error}") from error


def session_options(threads: int, spinning: bool, weights: Path | None) -> ort.SessionOptions:
    """What every session of ours is opened with."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails is raised; stderr is for our own lines
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if weights is not None:
        # The edited graph may lie in the cache: its weights are found beside the original.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights)
        )
    return options


# As the allocators of onnxruntime, CUDA, cuDNN, cuBLAS and the C++ library say it.
_MEMORY = (
    "failed to allocate memory",
    "available memory",
    "out of memory",
    "bad_alloc",
    "alloc_failed",
    "memory allocation",
)


def failure(error: Exception) -> WorkerError:
    """What a session raised, as ours: "memory" or "runtime"."""
    said = " ".join(str(error).split())[:500]
    short = isinstance(error, MemoryError) or any(sign in said.lower() for sign in _MEMORY)
    return WorkerError("memory" if short else "runtime", said)
