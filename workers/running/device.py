"""A GPU as the runner sees it: sessions on it, memory, inputs, and how a call is made.

onnxruntime falls back to the processor in silence when CUDA cannot be had, and is loud about it on
both outputs: here what is missing is looked for first, and said in one line. Decode calls are
replayed from CUDA graphs, one for each of a few batch sizes; where the runtime cannot capture the
model they are made one by one. Knows sessions, nothing of rows, tokens or requests.
"""

import contextlib
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from orchestrator.errors import WorkerError
from workers.running.cuda import Cuda, check_driver, check_libraries
from workers.running.device_feeds import DeviceFeeds
from workers.running.device_kv import DeviceMemory
from workers.running.device_room import Room
from workers.running.host import RUNTIME_VERSION, failure, open_session, session_options

log = logging.getLogger("penstock.device")

PROVIDER = "CUDAExecutionProvider"
GRAIN = 256
"""Tokens of each prompt call of a deterministic device. Reading the weights once takes longer than
computing so many, so a short prompt pays little for being filled up."""

_EAGER = "-1"  # as a graph's id: neither captured nor replayed
_IDS_A_MEMORY = 4096  # graphs of one memory; another one has other addresses


class Device:
    """One model's session on one GPU; not thread-safe: the engine's thread owns it."""

    def __init__(
        self, session: Any, room: Room, *, line: str, graphs: bool, deterministic: bool
    ) -> None:
        """Of parts: `open` makes them. `line` says for people what this is."""
        self.session, self.room, self.line = session, room, line
        self.invariant = deterministic
        self.grain = GRAIN if deterministic else 1
        self._graphs, self._memories = graphs, 0
        self._options: dict[str, Any] = {}

    @classmethod
    def open(
        cls, graph: bytes, device: str, *, weights: Path, threads: int, deterministic: bool
    ) -> "Device":
        """A session of the prepared `graph`, its external data in the folder `weights`.

        Raises WorkerError: device (what is missing), model (this graph is not for GPUs), memory.
        """
        room = open_room(device)
        options = session_options(threads, False, weights)
        options.use_deterministic_compute = deterministic
        session, graphs = _open_model(graph, options, room)
        _check_kinds(session)
        how = ["CUDA graphs"] * graphs + ["deterministic"] * deterministic
        line = ", ".join([f"onnxruntime {RUNTIME_VERSION}, CUDA provider on {room.name}", *how])
        return cls(session, room, line=line, graphs=graphs, deterministic=deterministic)

    def open_session(self, graph: bytes) -> Any:
        """A small graph of our own on this device, in the order of this device's other work."""
        if self.room.type == "cpu":
            return open_session(graph, threads=1)
        options = session_options(1, False, None)
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            return _open(graph, options, self.room, graphs=False)
        except WorkerError as error:  # an operator without a kernel here: slow, and as right
            log.warning("device.sampler_not_whole: %s", error)
            return _open(graph, session_options(1, False, None), self.room, graphs=False)

    def memory(
        self,
        kinds: Mapping[str, str],
        present: Mapping[str, str],
        rows: int,
        heads: int,
        length: int,
        size: int,
        room: int | None = None,
    ) -> DeviceMemory:
        """Rows of KV, all held at once whatever the `room`; raises WorkerError "memory"."""
        self._memories += 1
        return DeviceMemory(self.room, kinds, present, rows, heads, length, size)

    def feeds(self, rows: int, width: int, vocab: int, kind: str, positions: bool) -> DeviceFeeds:
        """The small inputs and the logits; `width`: a row's length."""
        return DeviceFeeds(self.room, rows, width, vocab, kind, positions, self.grain)

    def padded(self, batch: int, slots: int) -> int:
        """The rows that a decode call for `batch` of `slots` rows has."""
        if self.invariant:
            return slots
        if not self._graphs:
            return batch
        power = 1 << (batch - 1).bit_length()
        return min(power if power <= 8 else -(-batch // 8) * 8, slots)

    def run(self, binding: Any, batch: int | None) -> None:
        """One call: a decode of `batch` rows, or (None) of prompts."""
        id = _EAGER
        if batch is not None and self._graphs:
            id = str(self._memories * _IDS_A_MEMORY + batch)
        if batch is None:
            binding.synchronize_inputs()
        self._call(binding, self._option(id))

    def run_part(self, binding: Any) -> None:
        """A call of prompts whose logits nobody wants: the binding has none."""
        options = self._option("part")
        options.only_execute_path_to_fetches = True
        binding.synchronize_inputs()
        self._call(binding, options)

    def free_bytes(self) -> int:
        """Memory of the device that nobody holds."""
        return self.room.free_bytes()

    def _option(self, id: str) -> Any:
        if id not in self._options:
            options = self._options[id] = ort.RunOptions()
            options.log_severity_level = 4
            options.add_run_config_entry("gpu_graph_id", _EAGER if id == "part" else id)
        return self._options[id]

    def _call(self, binding: Any, options: Any) -> None:
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:  # onnxruntime raises its own C++ classes, one for each status
            raise failure(error) from error


def parse(device: str) -> tuple[str, int]:
    """`cpu`, `cuda` or `cuda:1` -> ("cpu" | "cuda", number); WorkerError "device" otherwise."""
    type, colon, number = device.partition(":")
    if type == "cuda" and (not colon or (number.isascii() and number.isdecimal())):
        return type, int(number or 0)
    if device == "cpu":
        return device, 0
    raise WorkerError("device", f"device {device!r}: expected cpu, cuda, or cuda:0 and so on")


def open_room(device: str) -> Cuda:
    """The GPU, once all that it needs is there; raises WorkerError "device" naming what is not."""
    _, index = parse(device)
    if PROVIDER not in ort.get_available_providers():
        raise WorkerError(
            "device",
            f"device cuda:{index}: onnxruntime {RUNTIME_VERSION} is here without CUDA: "
            "pip install 'penstock[cuda]' (Linux or Windows on x86-64), or use --device cpu",
        )
    major = int(ort.cuda_version.partition(".")[0])
    check_driver(index, major)
    with contextlib.redirect_stdout(io.StringIO()):  # where it says what it does not find
        ort.preload_dlls()
    check_libraries(index, major)
    return Cuda(index, major)


def free_bytes(device: str) -> int:
    """Memory of a GPU that nobody holds, before anything is opened on it."""
    room = open_room(device)
    try:
        return room.free_bytes()
    finally:
        room.close()


def _open_model(graph: bytes, options: Any, room: Cuda) -> tuple[Any, bool]:
    """The session, and whether its calls can be captured."""
    try:
        return _open(graph, options, room, graphs=True), True
    except WorkerError as error:
        if "graph capture" not in error.message:
            raise
        log.info("device.no_graphs: %s", error)
        return _open(graph, options, room, graphs=False), False


def _open(graph: bytes, options: Any, room: Any, *, graphs: bool) -> Any:
    """A session that runs on the device, or the reason why not."""
    own = {
        "device_id": str(room.index),
        "user_compute_stream": str(room.stream),
        "arena_extend_strategy": "kSameAsRequested",  # else it takes up to twice what it needs
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "enable_cuda_graph": str(int(graphs)),
    }
    before = _hush(4)
    try:
        providers = [(PROVIDER, own), "CPUExecutionProvider"]
        session = ort.InferenceSession(graph, options, providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own C++ classes, one for each status
        found = failure(error)
        code = "memory" if found.code == "memory" else "model"
        raise WorkerError(code, f"onnxruntime refuses it: {found}") from error
    finally:
        _hush(before)
    if session.get_providers()[0] != PROVIDER:
        raise WorkerError(
            "device",
            f"device cuda:{room.index}: onnxruntime {RUNTIME_VERSION} cannot use it and does not "
            f"say why; PENSTOCK_LOG=debug shows what it prints, --device cpu does without",
        )
    return session


def _hush(severity: int) -> int:
    """What onnxruntime prints of its own accord, from now on; that was 2 (warnings)."""
    if log.getEffectiveLevel() > logging.DEBUG:
        ort.set_default_logger_severity(severity)
    return 2


def _check_kinds(session: Any) -> None:
    """CUDA's attention computes in half precision only: in float32 each layer would go through the
    processor, without a word."""
    if any(len(i.shape) == 4 and i.type == "tensor(float)" for i in session.get_inputs()):
        raise WorkerError(
            "model",
            "its KV is float32, for which onnxruntime has no attention on CUDA: "
            "import the model with --precision fp16, bf16 or int4 and --device cuda",
        )
