"""How many rows of what length the memory has room for: from numbers to a Sizing.

On the host a row holds only what was written (kv.py), so `capacity` counts tokens over all rows and
many short requests may sit where few long ones could. On a device every row is whole. Pure; knows
nothing of where the numbers come from.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import WorkerError
from orchestrator.settings import Settings
from workers.folders.folder import ModelFolder

LEAST_TOKENS = 16
"""A row of fewer positions serves nobody."""
USUAL_TOKENS = 512
"""What a request takes, where the number of slots is not given: more rows than memory for so long
ones would wait for each other."""
SLOTS, DEVICE_SLOTS = 32, 128
"""Rows beyond which hardly more tokens come out a second, where nothing was measured."""
STAGING = 4
_SHORT = 64  # tokens of prompts computed together, in the staging rows but the first


@dataclass(frozen=True, slots=True)
class Sizing:
    """`capacity`: tokens that the rows of the batch may hold together, at least `max_length`.

    `paged`: the host keeps no more than that in memory; otherwise all rows may be full.
    """

    slots: int
    staging: int
    max_length: int
    capacity: int
    prefix_cache_bytes: int
    kv_bytes_per_token: int
    paged: bool = True


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is asked for. `length`: positions of the longest row; `slots` 0: up to `most`."""

    length: int
    slots: int = 0
    most: int = SLOTS
    staging: int = STAGING
    percent: int = 80
    prefix_cache_bytes: int = 0
    grain: int = 1  # rows are whole multiples of it

    @classmethod
    def of(cls, settings: Settings, context: int, **others: int) -> "Wishes":
        """The settings', for a model of `context` positions; `others` as the fields are named."""
        wishes = cls(
            length=min(context, settings.max_context),
            slots=settings.slots,
            percent=settings.memory_percent,
            prefix_cache_bytes=settings.prefix_cache_mib << 20,
        )
        return replace(wishes, **others)


def on_host(wishes: Wishes, *, free: int, per_token: int, per_row: int) -> Sizing:
    """Rows that share `free` bytes; `per_row`: bytes that each takes beside its KV.

    Where memory is short the prefix cache keeps a quarter of it at most, then the longest row is
    shorter than was wished. Raises WorkerError "memory" where that is too short.
    """
    budget, prefixes = _budget(wishes, free)
    slots = wishes.slots or wishes.most
    rows = slots + wishes.staging
    tokens = (budget - prefixes - rows * per_row) // per_token - (wishes.staging - 1) * _SHORT
    length = min(wishes.length, tokens // 2)  # a prompt in staging, and where it is copied to
    _check(wishes, length, free, per_token)
    capacity = tokens - length
    if not wishes.slots:
        slots = max(1, min(slots, capacity // min(length, USUAL_TOKENS)))
    whole = (slots + wishes.staging) * length
    return Sizing(
        slots=slots,
        staging=wishes.staging,
        max_length=length,
        capacity=min(capacity, slots * length),
        prefix_cache_bytes=prefixes,
        kv_bytes_per_token=per_token,
        paged=whole > tokens // 4,
    )


def on_device(wishes: Wishes, *, free: int, per_token: int, per_row: int) -> Sizing:
    """Whole rows in `free` bytes; fewer than were wished, and then shorter ones, where it is short.

    Raises WorkerError "memory" where not even one of `LEAST_TOKENS` can be had.
    """
    budget, prefixes = _budget(wishes, free)
    tokens = (budget - prefixes - (1 + wishes.staging) * per_row) // per_token
    length = min(wishes.length, tokens // (1 + wishes.staging))
    whole = -(-length // wishes.grain) * wishes.grain
    if whole > length and whole * (1 + wishes.staging) > tokens:
        whole = length = length // wishes.grain * wishes.grain
    _check(wishes, length, free, per_token)
    rows = (budget - prefixes) // (whole * per_token + per_row)
    slots = min(wishes.slots or wishes.most, rows - wishes.staging)
    return Sizing(
        slots=slots,
        staging=wishes.staging,
        max_length=length,
        capacity=slots * length,
        prefix_cache_bytes=prefixes,
        kv_bytes_per_token=per_token,
        paged=False,
    )


def per_token(folder: ModelFolder, element_bytes: int) -> int:
    """Bytes of KV that one token takes, by the folder alone."""
    return 2 * folder.layers * folder.kv_heads * folder.head_size * element_bytes


def weights_bytes(folder: ModelFolder) -> int:
    """Size of the files that hold the weights: the graph's, and its external data beside it."""
    files = folder.graph.parent.glob(f"{_escaped(folder.graph)}*")
    return sum(file.stat().st_size for file in files if file.is_file())


def longest_here(folder: ModelFolder, settings: Settings, memory: int) -> int:
    """Positions that a row could have with `memory` bytes for this model alone: no worker on such
    a machine, whatever else it does, would have more. KV of two bytes an element, the least."""
    wishes = Wishes.of(settings, folder.context_length, slots=1, staging=1, percent=100)
    wishes = replace(wishes, prefix_cache_bytes=0)
    free = memory - weights_bytes(folder)
    try:
        return on_host(wishes, free=free, per_token=per_token(folder, 2), per_row=0).max_length
    except WorkerError:  # such a worker does not start: nothing is known of those that do
        return wishes.length


def _budget(wishes: Wishes, free: int) -> tuple[int, int]:
    """Bytes for everything, and those of them for the prefix cache."""
    budget = max(0, free) * wishes.percent // 100
    return budget, min(wishes.prefix_cache_bytes, budget // 4)


def _check(wishes: Wishes, length: int, free: int, per_token: int) -> None:
    if length < min(LEAST_TOKENS, wishes.length):
        raise WorkerError(
            "memory",
            f"{max(0, free) / 2**20:.1f} MiB are free beside the weights, {wishes.percent} % of "
            f"them may be taken: no room for one row of {LEAST_TOKENS} tokens and its prompt at "
            f"{per_token} bytes a token",
        )


def _escaped(graph: Path) -> str:
    return "".join(f"[{each}]" if each in "*?[" else each for each in graph.name)
