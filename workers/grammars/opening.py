"""Whether a text has come to a call's opening, token by token, and which tokens lead into one.

Works on bytes, so an opening may come as one token, in pieces, or with text on either side of it
in the same token. Knows nothing of grammars: whether what follows the opening is allowed is for
others to say. One `Openings` serves all texts of a vocabulary and a form of calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from workers.words.tokenizer import Lead


class Openings:
    """The opening `anywhere` in a text, or one of `at_start` where it begins."""

    def __init__(
        self, tokens: Sequence[bytes], lead: Lead, anywhere: bytes, at_start: tuple[bytes, ...]
    ) -> None:
        """`tokens`: each id's bytes."""
        self.anywhere, self.at_start = anywhere, at_start
        self.beginning = Before(self, lead, bool(at_start))
        last = {opening[-1:] for opening in (anywhere, *at_start)}
        self._ending = {
            id: data for id, data in enumerate(tokens) if any(byte in data for byte in last)
        }
        self._leading: dict[Before, Mapping[int, bytes]] = {}

    def leading(self, before: "Before") -> Mapping[int, bytes]:
        """The tokens that would open a call and go on after the opening, with all from there."""
        found = self._leading.get(before)
        if found is None:
            opened = {id: before.after(data) for id, data in self._ending.items()}
            found = {
                id: text
                for id, text in opened.items()
                if isinstance(text, bytes) and text != self.anywhere
            }
            self._leading[before] = found
        return found


@dataclass(frozen=True, slots=True)
class Before:
    """Where a text without a call stands.

    `held`: the longest end of it that begins the opening; while `at_start`, all of it.
    """

    openings: Openings
    lead: Lead
    at_start: bool
    held: bytes = b""

    def after(self, data: bytes) -> "Before | bytes":
        """Where the text stands after `data`; bytes if a call opened: all of them from there."""
        data, lead = self.lead.cut(data)
        text = self.held + data
        if self.at_start:
            if text.startswith(self.openings.at_start):
                return text
            if any(opening.startswith(text) for opening in self.openings.at_start):
                return replace(self, lead=lead, held=text)
        at = text.find(self.openings.anywhere)
        if at >= 0:
            return text[at:]
        return Before(self.openings, lead, False, _begun(text, self.openings.anywhere))


def _begun(text: bytes, opening: bytes) -> bytes:
    """The longest end of `text` that begins `opening` and is not all of it."""
    for size in range(min(len(text), len(opening) - 1), 0, -1):
        if opening.startswith(text[-size:]):
            return text[-size:]
    return b""
