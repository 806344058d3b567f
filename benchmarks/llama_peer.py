"""llama.cpp as a peer, through its own C interface: continuous batches, with and without copies.

Runs in the peers' environment. As in its server every pass holds one token of each running sequence
and as much of the new prompts as fits. `independent` computes every prompt; `copied` keeps a prompt
in a sequence of its own and copies what a new one has in common with it, inside the library. Tokens
are chosen by numpy's argmax, which costs less than the library's samplers.
"""

import argparse
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import llama_cpp as lib
import numpy as np
from peer_side import Mode, Stamps, Work, serve

BATCH = 2048  # tokens of one pass at most; the library's default
WORTH_A_COPY = 0.5  # of a prompt; one with less in common is kept in the old one's place
KV_TYPES = {"f32": 0, "f16": 1}  # ggml.h


@dataclass
class Row:
    """A sequence of the library: `length` tokens are in its memory, `found` came of them."""

    number: int
    prompt: Sequence[int]
    limit: int
    place: int
    length: int
    found: list[int] = field(default_factory=list)

    @property
    def waiting(self) -> Sequence[int]:
        """Tokens to compute before the next one can be chosen."""
        return self.prompt[self.length :] or self.found[-1:]


class Context:
    """Memory for `sequences` of `length` tokens each, and the batch that is filled for a pass."""

    def __init__(
        self, model: int, sequences: int, length: int, options: argparse.Namespace
    ) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = sequences * length, BATCH, sequences
        params.n_threads = params.n_threads_batch = options.threads
        params.type_k = params.type_v = KV_TYPES[options.kv]
        params.kv_unified = options.unified
        if options.flash is not None:
            params.flash_attn_type = int(options.flash)
        context = lib.llama_init_from_model(model, params)
        assert context is not None, "llama.cpp has no memory for this"
        self.handle, self.memory = context, lib.llama_get_memory(context)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.batch = lib.llama_batch_init(BATCH, 0, 1)

    def clear(self) -> None:
        lib.llama_memory_clear(self.memory, True)

    def add(self, row: Row) -> bool:
        """As many of the row's waiting tokens as fit; whether that was all of them."""
        batch, waiting = self.batch, row.waiting
        first = batch.n_tokens
        fitting = waiting[: BATCH - first]
        for i, token in enumerate(fitting):
            batch.token[first + i], batch.pos[first + i] = token, row.length + i
            batch.n_seq_id[first + i], batch.seq_id[first + i][0] = 1, row.place
            batch.logits[first + i] = i == len(waiting) - 1
        batch.n_tokens += len(fitting)
        row.length += len(fitting)
        return len(fitting) == len(waiting)

    def compute(self) -> None:
        status = lib.llama_decode(self.handle, self.batch)
        assert status == 0, f"llama_decode: {status}"
        self.batch.n_tokens = 0

    def choose(self, index: int, forbidden: Sequence[int]) -> int:
        """The likeliest token after the token at `index` of the batch."""
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.handle, index), (self.vocab,))
        logits[forbidden] = -np.inf
        return int(logits.argmax())

    def copy(self, source: int, target: int, length: int) -> None:
        """`target` has the first `length` tokens of `source`, and no others."""
        lib.llama_memory_seq_rm(self.memory, target, -1, -1)
        lib.llama_memory_seq_cp(self.memory, source, target, -1, -1)
        lib.llama_memory_seq_rm(self.memory, target, length, -1)


class Run:
    """One piece of work: who runs, who waits, and the prompt that is kept."""

    def __init__(self, context: Context, work: Work, copied: bool) -> None:
        self.context, self.work, self.copied = context, work, copied
        self.queue = deque(range(len(work.prompts)))
        self.free = list(range(work.rows))
        self.running: list[Row] = []
        self.kept: Sequence[int] = ()
        self.tokens: list[list[int]] = [[] for _ in work.prompts]

    def whole(self, stamps: Stamps) -> list[list[int]]:
        self.context.clear()
        while self.queue or self.running:
            self.seat()
            stamps(self.step())
        return self.tokens

    def seat(self) -> None:
        while self.queue and self.free and (row := self.sit()) is not None:
            self.running.append(row)
            self.queue.popleft()

    def sit(self) -> Row | None:
        """The next row; None while the prompt that it will copy is being computed."""
        number = self.queue[0]
        prompt, limit = self.work.prompts[number], self.work.limits[number]
        length = 0
        if self.copied:
            least = WORTH_A_COPY * len(prompt)
            beginning = [row for row in self.running if row.length < len(row.prompt)]
            if any(common(row.prompt, prompt) >= least for row in beginning):
                return None
            if (found := common(self.kept, prompt)) >= least:
                length = min(found, len(prompt) - 1)
        place = min(self.free)
        self.free.remove(place)
        self.context.copy(self.work.rows, place, length)
        return Row(number, prompt, limit, place, length)

    def step(self) -> int:
        """One pass; how many tokens came of it."""
        asked = []
        # In the order of their places: with a memory for each sequence the library computes those
        # together that follow each other, and the others one by one.
        for row in sorted(self.running, key=lambda row: (len(row.waiting), row.place)):
            if self.context.batch.n_tokens < BATCH and self.context.add(row):
                asked.append((row, self.context.batch.n_tokens - 1))
        self.context.compute()
        for row, index in asked:
            if not row.found:
                self.keep(row)
            row.found.append(self.context.choose(index, self.work.forbidden))
            if len(row.found) == row.limit:
                self.leave(row)
        return len(asked)

    def keep(self, row: Row) -> None:
        """Its prompt is computed: the next ones may copy it."""
        if self.copied and common(self.kept, row.prompt) < WORTH_A_COPY * len(row.prompt):
            self.context.copy(row.place, self.work.rows, row.length)
            self.kept = row.prompt

    def leave(self, row: Row) -> None:
        self.tokens[row.number] = row.found
        self.running.remove(row)
        self.free.append(row.place)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


class Library:
    """The model, and one context for each size of work."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.silence = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.silence, None)
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        self.model = lib.llama_model_load_from_file(options.file.encode(), params)
        assert self.model is not None, f"llama.cpp cannot read {options.file}"
        self.contexts: dict[tuple[int, int], Context] = {}

    def modes(self) -> Mapping[str, Mode]:
        modes = {"independent": False, "copied": True}
        return {name: partial(self.run, copied) for name, copied in modes.items()}

    def run(self, copied: bool, work: Work, stamps: Stamps) -> list[list[int]]:
        longest = max(len(p) + n for p, n in zip(work.prompts, work.limits, strict=True))
        size = work.rows + 1, -(-longest // 256) * 256
        if size not in self.contexts:
            self.contexts[size] = Context(self.model, *size, self.options)
        return Run(self.contexts[size], work, copied).whole(stamps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv", choices=KV_TYPES, default="f16")
    parser.add_argument("--unified", action="store_true", help="one memory for all sequences")
    parser.add_argument(
        "--flash", action=argparse.BooleanOptionalAction, help="default: it decides"
    )
    options = parser.parse_args()
    serve(("llama-cpp-python",), lambda: Library(options).modes())


if __name__ == "__main__":
    main()
