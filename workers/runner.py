"""An onnxruntime session and its KV memory: token rows in, logits out.

One buffer for each layer's keys and one for its values, `[slots, kv_heads, max_length, head_size]`;
past and present are bound to the same memory, so a step writes one position a row and copies
nothing. Active slots are 0..B-1 (slots.py sees to that): a batch is a view of the first B rows.
The only file that imports onnxruntime. Knows nothing of sampling, text or requests.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from orchestrator.errors import WorkerError
from workers.folder import ModelFolder
from workers.prepare import LAST, LENGTHS, TOTAL, prepare

Logits = npt.NDArray[np.float32]
RUNTIME_VERSION = str(ort.__version__)
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


class Runner:
    """One model on one device; not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        folder: Path,
        *,
        slots: int,
        max_length: int,
        device: str = "cpu",
        threads: int = 0,
        cache: Path | None = None,
    ) -> None:
        """Load the prepared graph and allocate `slots` rows of `max_length` positions.

        `threads` 0 leaves one thread a core. Raises WorkerError: device, model, memory.
        """
        self.folder = ModelFolder.load(folder)
        self.slots = slots
        self.max_length = min(max_length, self.folder.context_length)
        self.device, self.threads = device, threads or (os.cpu_count() or 1)
        self._session = _open(self.folder, device, self.threads, cache)
        self._allocate()
        self._decode_bindings: dict[int, ort.IOBinding] = {}
        self._try_out()

    @property
    def vocab_size(self) -> int:
        """Columns of the logits; may exceed the tokenizer's vocabulary (padding rows)."""
        return int(self._logits.shape[1])

    @property
    def device_line(self) -> str:
        """What this session really runs on, for people."""
        provider = self._session.get_providers()[0].removesuffix("ExecutionProvider")
        what = f"onnxruntime {RUNTIME_VERSION}, {provider} provider"
        return f"device {self.device}: {what}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def kv_bytes_per_slot(self) -> int:
        """Bytes of KV memory that one slot holds."""
        return sum(buffer[0].nbytes for buffer in self._kv.values())

    def prefill(self, slot: int, tokens: Sequence[int]) -> Logits:
        """Compute a whole prompt into `slot`; float32 `[vocab]`, of its last token (a copy)."""
        length = len(tokens)
        if not 0 < length <= self.max_length:
            raise ValueError(f"a prompt of {length} tokens in slots of {self.max_length}")
        binding = self._session.io_binding()
        values = {
            "input_ids": np.asarray([tokens], dtype=np.int64),
            LENGTHS: np.asarray([length - 1], dtype=np.int32),
            TOTAL: np.asarray(length, dtype=np.int32),
            LAST: np.asarray([[length - 1]], dtype=np.int64),
        }
        for name, value in values.items():
            binding.bind_cpu_input(name, value)
        self._bind_slots(binding, slot, 1)
        self._run(binding)
        row: Logits = self._logits[slot].astype(np.float32)
        return row

    def decode(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> Logits:
        """One token for each of the slots 0..B-1, written at position `lengths[i]`.

        `tokens` and `lengths` are whole numbers `[B]`. Returns float32 `[B, vocab]`, valid until
        the next call. A row's logits do not depend on the other rows (tests/workers).
        """
        batch = len(np.asarray(tokens))
        self._tokens[:batch, 0] = tokens
        self._lengths[:batch] = lengths
        self._total[...] = self._lengths[:batch].max() + 1
        if self._total > self.max_length:
            raise ValueError(f"position {self._total - 1} in slots of {self.max_length}")
        self._run(self._decode_binding(batch))
        return self._logits[:batch].astype(np.float32, copy=False)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot's KV into another's."""
        for buffer in self._kv.values():
            buffer[target, :, :length] = buffer[source, :, :length]

    def resize(self, slots: int) -> None:
        """Hold so many slots from now on, all of them empty; the memory of the others is free.

        Raises WorkerError "memory" if they cannot be had.
        """
        self._decode_bindings.clear()
        self._kv.clear()
        self.slots = slots
        self._allocate()

    def close(self) -> None:
        """Give the session and its memory back."""
        self._decode_bindings.clear()
        self._kv.clear()
        del self._session

    def _try_out(self) -> None:
        """Some graphs load and then cannot run on this device: better known now than in a job."""
        try:
            self.prefill(0, (0,))
            self.decode((0,), (0,))
        except WorkerError as error:
            code = "memory" if error.code == "memory" else "model"
            raise WorkerError(code, f"{self.folder.path}: a step failed: {error}") from error

    def _run(self, binding: ort.IOBinding) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises its own C++ classes, one for each status
            raise _failure(error) from error

    def _allocate(self) -> None:
        shape = (self.slots, self.folder.kv_heads, self.max_length, self.folder.head_size)
        kinds = {i.name: i.type for i in self._session.get_inputs()}
        output = next(o for o in self._session.get_outputs() if o.name == "logits")
        self._present: dict[str, str] = {}
        for layer in range(self.folder.layers):
            self._present[self.folder.past_key % layer] = self.folder.present_key % layer
            self._present[self.folder.past_value % layer] = self.folder.present_value % layer
        outputs = {o.name for o in self._session.get_outputs()}
        for past, present in self._present.items():
            if past not in kinds or present not in outputs:
                what = f"input {past!r} and output {present!r}"
                raise WorkerError("model", f"{self.folder.graph}: not supported: expected {what}")
        try:
            self._kv = {name: np.zeros(shape, _dtype(name, kinds[name])) for name in self._present}
            self._logits = np.zeros(
                (self.slots, int(output.shape[-1])), _dtype("logits", output.type)
            )
        except (MemoryError, ValueError) as error:  # numpy: a size that no address reaches
            raise WorkerError("memory", f"no memory for {self.slots} slots: {error}") from error
        self._tokens = np.zeros((self.slots, 1), np.int64)
        self._lengths = np.zeros(self.slots, np.int32)
        self._total = np.zeros((), np.int32)
        self._last = np.zeros((self.slots, 1), np.int64)

    def _decode_binding(self, batch: int) -> ort.IOBinding:
        # Rebuilding a binding costs 0.3 ms at 24 layers, so each batch size keeps its own.
        if batch not in self._decode_bindings:
            binding = self._session.io_binding()
            _bind(binding, "input_ids", self._tokens[:batch])
            _bind(binding, LENGTHS, self._lengths[:batch])
            _bind(binding, TOTAL, self._total)
            _bind(binding, LAST, self._last[:batch])
            self._bind_slots(binding, 0, batch)
            self._decode_bindings[batch] = binding
        return self._decode_bindings[batch]

    def _bind_slots(self, binding: ort.IOBinding, first: int, count: int) -> None:
        for past, present in self._present.items():
            rows = self._kv[past][first : first + count]
            _bind(binding, past, rows)
            binding.bind_output(present, "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
        rows = self._logits[first : first + count]
        binding.bind_output("logits", "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)


def _bind(binding: ort.IOBinding, name: str, value: npt.NDArray[np.generic]) -> None:
    binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)


def _dtype(name: str, kind: str) -> type[np.generic]:
    if kind not in _DTYPES:
        raise WorkerError("model", f"not supported on this device: {name} of type {kind}")
    return _DTYPES[kind]


# As the allocators of onnxruntime, CUDA, cuDNN, cuBLAS and the C++ library say it.
_MEMORY = (
    "failed to allocate memory",
    "available memory",
    "out of memory",
    "bad_alloc",
    "alloc_failed",
    "memory allocation",
)


def _failure(error: Exception) -> WorkerError:
    said = " ".join(str(error).split())[:500]
    short = isinstance(error, MemoryError) or any(sign in said.lower() for sign in _MEMORY)
    return WorkerError("memory" if short else "runtime", said)


def _open(
    folder: ModelFolder, device: str, threads: int, cache: Path | None
) -> ort.InferenceSession:
    if device != "cpu":
        raise WorkerError("device", f"device {device!r} is not supported yet: use --device cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails is raised; stderr is for our own lines
    # The edited graph may lie in the cache: its weights are found beside the original.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder.path)
    )
    graph = prepare(folder.path, cache).read_bytes()
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own C++ classes, one for each status
        raise WorkerError("model", f"{folder.path}: onnxruntime refuses it: {error}") from error
