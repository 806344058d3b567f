"""Who waits for a seat, in which order, and who may sit down next.

First come, first served, the urgent before the others: where the first has no room, nobody behind
it sits down either, so that small ones never starve a large one. Knows nothing of runners, of
prompts' KV or of who is seated.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from orchestrator.errors import RequestError
from workers.engine.events import Completion
from workers.engine.prefixes import key_of
from workers.engine.seats import Admitted


class Waiting:
    """One engine's queue."""

    def __init__(self) -> None:
        self.all: deque[Admitted] = deque()
        self.only: frozenset[int] | None = None
        """Nobody else is next (None: anybody may be)."""

    @property
    def choices(self) -> int:
        """How many choices wait."""
        return sum(len(admitted.waiting) for admitted in self.all)

    @property
    def urgent(self) -> int:
        """How many of them are of urgent completions."""
        return sum(len(each.waiting) for each in self.all if each.completion.urgent)

    def add(self, completion: Completion, room: int) -> None:
        """Queue a completion for slots of `room` tokens; RequestError if it can never fit."""
        prompt, wanted = len(completion.prompt), completion.max_tokens
        if prompt == 0:
            raise RequestError("empty_prompt", "The chat template rendered no tokens.")
        if prompt + (wanted or 1) > room:
            raise RequestError("context_length_exceeded", _too_long(room, prompt, wanted))
        limit, key = wanted or room - prompt, key_of(completion.prompt)
        place = self._behind_urgent() if completion.urgent else len(self.all)
        self.all.insert(place, Admitted(completion, limit, deque(completion.choices), key))

    def _behind_urgent(self) -> int:
        """Behind the last that is urgent too, or whose prompt lies in a staging row: that row would
        be another's if somebody went before it."""
        ahead = (
            p for p, each in enumerate(self.all) if each.completion.urgent or each.row is not None
        )
        return max(ahead, default=-1) + 1

    def seatable(
        self, slots: int, tokens: int, after: Admitted | None = None
    ) -> Iterator[Admitted]:
        """Who may sit down, in order, in so many free slots that may hold so many tokens.

        With `after`, only those behind it, and only if all choices of each find a slot.
        """
        for admitted in self.all:
            if self.only is not None and admitted.completion.id not in self.only:
                continue
            if not slots or admitted.tokens > tokens:
                return
            count = len(admitted.waiting)
            if after is None or (admitted is not after and count <= slots):
                yield admitted
            slots, tokens = max(0, slots - count), tokens - count * admitted.tokens


def longest_first(completions: Sequence[Completion], room: int) -> list[Completion]:
    """Those that may take longest first, so that the batch is full to its end.

    The length is what may be sampled, in slots of `room` tokens where no limit is given. Those of
    one prompt stay together: it is computed once. Else the order is as given.
    """
    groups: dict[tuple[int, ...], list[Completion]] = {}
    for completion in completions:
        groups.setdefault(completion.prompt, []).append(completion)

    def steps(completion: Completion) -> int:
        return completion.max_tokens or room - len(completion.prompt)

    ordered = sorted(groups.values(), key=lambda group: -max(map(steps, group)))
    return [each for group in ordered for each in sorted(group, key=lambda each: -steps(each))]


def _too_long(room: int, prompt: int, wanted: int | None) -> str:
    completion = wanted or 1
    return (
        f"This model's maximum context length is {room} tokens. However, you requested "
        f"{prompt + completion} tokens ({prompt} in the messages, {completion} in the completion). "
        "Please reduce the length of the messages or completion."
    )
