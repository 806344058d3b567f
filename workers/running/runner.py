"""A session and its KV memory: token rows in, logits out.

Past and present are bound to the same memory, so a step writes one position a row and copies
nothing. The running batch is rows 0..B-1 (engine/batch.py sees to that): a view of the first B
of `slots` rows; prompts are computed in `staging` rows behind them. Where tensors lie and how a
call is made is the place's affair (host.py, device.py); here stands what is called with what.
Knows nothing of sampling, text or requests.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import WorkerError
from workers.folders.folder import ModelFolder
from workers.folders.prepare import POSITIONS, prepare
from workers.running.device import Device
from workers.running.feeds import even_width
from workers.running.host import RUNTIME_VERSION, Host, open_session
from workers.running.kv import Block
from workers.running.machine import default_threads
from workers.running.sizing import Sizing

__all__ = ["RUNTIME_VERSION", "Block", "Logits", "Runner", "open_session"]

Logits = npt.NDArray[np.float32]
CHUNK = 512
"""Tokens of a prompt in one call: more take more memory on the way and no less time a token."""


class Runner:
    """One model on one device; not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        folder: Path,
        *,
        slots: int,
        max_length: int,
        staging: int = 1,
        capacity: int | None = None,
        paged: bool = True,
        device: str = "cpu",
        threads: int = 0,
        spinning: bool = True,
        deterministic: bool = False,
        chunk: int = CHUNK,
        cache: Path | None = None,
        context: int | None = None,
        graph: Path | None = None,
    ) -> None:
        """Load the prepared graph and make `slots` + `staging` rows of `max_length` positions.

        `capacity`: tokens that the rows of the batch may hold together, all of them full by
        default; `paged`: the host keeps no more than these in memory. `threads` 0: one a core;
        never more than the model has heads.
        `graph`: what `prepare` gave; None: it is asked here, with `cache` and `context`.
        Raises WorkerError: device, model, memory.
        """
        self.folder = ModelFolder.load(folder)
        self.slots, self.staging = slots, staging
        self.max_length = min(max_length, self.folder.context_length)
        self._capacity, self._paged = capacity, paged
        self.device, self.threads = device, threads or default_threads()
        if device == "cpu":
            # With more threads than heads the kernel shares a long row's step out among them, but
            # only where few rows are in the batch: its numbers would depend on its neighbours.
            self.threads = min(self.threads, self.folder.heads)
        self.graph = graph or prepare(self.folder.path, cache, context=context)
        self.place = _open(self.folder, self.graph, device, self.threads, spinning, deterministic)
        self.grain: int = self.place.grain
        self._chunk = max(2, chunk) if self.grain == 1 else self.grain
        self._allocate()
        self._try_out()

    @property
    def capacity(self) -> int:
        """Tokens that the rows of the batch may hold together; at least `max_length`."""
        whole = self.slots * self.max_length
        return whole if self._capacity is None else min(whole, self._capacity)

    @property
    def vocab_size(self) -> int:
        """Columns of the logits; may exceed the tokenizer's vocabulary (padding rows)."""
        return self._vocab

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV memory that one position of one row holds."""
        return int(self._memory.bytes_per_token)

    @property
    def device_line(self) -> str:
        """What this session really runs on, for people."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        room = f"{self.slots} slots of {self.max_length} tokens, {self.capacity} in all"
        return f"device {self.device}: {self.place.line}, {threads}; {room}"

    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> Logits:
        """Compute positions `start`.. of a row; float32 `[vocab]`, of the last token (a copy).

        The row holds what belongs before `start`. Bitwise the same however a prompt is cut: hence
        never one token of it alone (ValueError), which takes the path of a decode step.
        """
        last = self._all_but_last(row, tokens, start)
        self._prompt([tokens[last - start :]], row, last, head=True)
        logits: Logits = self._feeds.prompt_logits(1)[0]
        return logits

    def extend(self, row: int, tokens: Sequence[int], start: int) -> None:
        """The same for a part of a prompt after which more comes: without the language head."""
        last = self._all_but_last(row, tokens, start)
        self._prompt([tokens[last - start :]], row, last, head=False)

    def prefill_together(self, first: int, prompts: Sequence[Sequence[int]]) -> Logits:
        """Whole prompts into the rows `first`.. in one call; float32 `[n, vocab]` (a copy).

        Computed as wide as the longest. Bitwise as `prefill` alone; hence at least two tokens in
        each (ValueError).
        """
        for place, prompt in enumerate(prompts):
            self._check(first + place, prompt, 0)
            if len(prompt) < 2:
                raise ValueError("a prompt of one token is computed alone")
        if self.grain > 1 or self._overflows(0, max(map(len, prompts))):
            each = enumerate(prompts, first)
            return np.stack([self.prefill(row, prompt) for row, prompt in each])
        self._prompt(prompts, first, 0, head=True)
        logits: Logits = self._feeds.prompt_logits(len(prompts))
        return logits

    def decode(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> Any:
        """One token for each of the rows 0..B-1, written at position `lengths[i]`.

        `tokens` and `lengths` are whole numbers `[B]`. Returns float32 `[B, vocab]` (on a device
        what its sampler takes), valid until the next call. A row's logits do not depend on the
        other rows (tests/workers).
        """
        ends = np.asarray(lengths) + 1
        batch = len(ends)
        if not 0 < batch <= self.slots:
            raise ValueError(f"{batch} rows in {self.slots} slots")
        if ends.max() > self.max_length:
            raise ValueError(f"position {ends.max() - 1} in slots of {self.max_length}")
        rows = self.place.padded(batch, self.slots)
        self._memory.hold(0, ends)
        self._feeds.step(tokens, lengths)
        self.place.run(self._decode_binding(rows), rows)
        return self._feeds.logits(batch)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row's KV into another's."""
        self._memory.copy(source, target, length)

    def read(self, row: int, start: int, end: int) -> Any:
        """A copy of the KV of positions `start`..`end`-1; it has `nbytes`."""
        return self._memory.read(row, start, end)

    def write(self, row: int, start: int, block: Any) -> None:
        """What was read from position `start` on, into another row, which then ends behind it."""
        self._memory.write(row, start, block)

    def trim(self, row: int, length: int) -> None:
        """Positions from `length` on are not needed any more: their memory is others'."""
        self._memory.trim(row, length)

    def resize(self, slots: int) -> None:
        """Hold so many slots from now on, all rows empty; the memory of the others is free.

        Raises WorkerError "memory" if they cannot be had.
        """
        self._close_memory()
        self.slots = slots
        self._allocate()

    def allot(self, sizing: Sizing) -> None:
        """Hold rows of these numbers and lengths from now on, all of them empty; as `resize`."""
        self._close_memory()
        self.slots, self.staging = sizing.slots, sizing.staging
        self.max_length = min(sizing.max_length, self.folder.context_length)
        self._capacity, self._paged = sizing.capacity, sizing.paged
        self._allocate()
        self._try_out()

    def close(self) -> None:
        """Give the session and its memory back."""
        self._close_memory()
        del self.place

    def _all_but_last(self, row: int, tokens: Sequence[int], start: int) -> int:
        """Compute all chunks of a prompt but the last; the position where that begins."""
        self._check(row, tokens, start)
        if len(tokens) == 1 and start and self.grain == 1:
            raise ValueError("one token of a prompt is not computed alone")
        end = start + len(tokens)
        cuts = _cuts(start, end, self._chunk, least=2 if self.grain == 1 else 1)
        if self._overflows(cuts[-1], end - cuts[-1]):
            cuts.append(end - 2)
        for begin, end in pairwise(cuts):
            self._prompt([tokens[begin - start : end - start]], row, begin, head=False)
        return cuts[-1]

    def _overflows(self, start: int, tokens: int) -> bool:
        """Whether a call would be padded beyond the last position that the model knows."""
        width = even_width(tokens, self.folder.head_size)
        return self.grain == 1 and width > tokens and start + width > self.folder.context_length

    def _check(self, row: int, tokens: Sequence[int], start: int) -> None:
        if not 0 <= row < self.slots + self.staging:
            raise ValueError(f"row {row} of {self.slots + self.staging}")
        if not len(tokens) or start < 0 or start + len(tokens) > self.max_length:
            what = f"a prompt of {start + len(tokens)} tokens"
            raise ValueError(f"{what} in slots of {self.max_length}")
        if start % self.grain:
            raise ValueError(
                f"position {start}: this device computes from multiples of {self.grain}"
            )

    def _prompt(
        self, prompts: Sequence[Sequence[int]], row: int, start: int, *, head: bool
    ) -> None:
        """One call: positions `start`.. of the rows `row`..; of one row where `start` is not 0."""
        binding = self.place.session.io_binding()
        lengths = [start + len(prompt) for prompt in prompts]
        self._memory.hold(row, lengths, max(lengths))
        self._feeds.bind_prompt(binding, prompts, start, head)
        self._memory.bind(binding, row, len(prompts))
        if head:
            self.place.run(binding, None)
        else:
            self.place.run_part(binding)

    def _try_out(self) -> None:
        """Some graphs load and then cannot run on this device: better known now than in a job."""
        try:
            self.prefill(0, (0,))
            self.decode((0,), (0,))
        except WorkerError as error:
            code = "memory" if error.code == "memory" else "model"
            raise WorkerError(code, f"{self.folder.path}: a step failed: {error}") from error

    def _allocate(self) -> None:
        session, folder = self.place.session, self.folder
        kinds = {i.name: i.type for i in session.get_inputs()}
        output = next(o for o in session.get_outputs() if o.name == "logits")
        present = _present(folder)
        outputs = {o.name for o in session.get_outputs()}
        for past, now in present.items():
            if past not in kinds or now not in outputs:
                what = f"input {past!r} and output {now!r}"
                raise WorkerError("model", f"{folder.graph}: not supported: expected {what}")
        rows, length = self.slots + self.staging, -(-self.max_length // self.grain) * self.grain
        self._vocab = int(output.shape[-1])
        self._memory = self.place.memory(
            {name: kinds[name] for name in present},
            present,
            rows,
            folder.kv_heads,
            length,
            folder.head_size,
            self.capacity + self.staging * self.max_length if self._paged else None,
        )
        self._feeds = self.place.feeds(rows, length, self._vocab, output.type, POSITIONS in kinds)
        self._decode_bindings: dict[int, Any] = {}

    def _close_memory(self) -> None:
        self._decode_bindings.clear()
        self._feeds.close()
        self._memory.close()

    def _decode_binding(self, batch: int) -> Any:
        # Rebuilding a binding costs 0.3 ms at 24 layers, so each batch size keeps its own.
        if batch not in self._decode_bindings:
            binding = self.place.session.io_binding()
            self._feeds.bind_step(binding, batch)
            self._memory.bind(binding, 0, batch)
            self._decode_bindings[batch] = binding
        return self._decode_bindings[batch]


def _present(folder: ModelFolder) -> dict[str, str]:
    """Name of each past input -> name of the output that goes with it."""
    layers = range(folder.layers)
    keys = {folder.past_key % i: folder.present_key % i for i in layers}
    return keys | {folder.past_value % i: folder.present_value % i for i in layers}


def _cuts(start: int, end: int, chunk: int, least: int) -> list[int]:
    """Where the chunks of positions `start`..`end`-1 begin; a last one of less than `least` tokens
    joins its neighbour."""
    return [cut for cut in range(start, end, chunk) if cut == start or end - cut >= least]


def _open(
    folder: ModelFolder, graph: Path, device: str, threads: int, spinning: bool, deterministic: bool
) -> Any:
    weights, whole = folder.graph.parent, graph.read_bytes()
    try:
        if device == "cpu":
            return Host.open(whole, weights=weights, threads=threads, spinning=spinning)
        return Device.open(
            whole, device, weights=weights, threads=threads, deterministic=deterministic
        )
    except WorkerError as error:
        if error.code != "model":
            raise
        raise WorkerError("model", f"{folder.path}: {error.message}") from error
