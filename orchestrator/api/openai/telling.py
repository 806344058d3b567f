"""A stored result -> the completion as `/v1` tells it, whenever it is told.

Folded in `orchestrator.export`; knows nothing of HTTP or of whose it is.
"""

from __future__ import annotations

from orchestrator import export
from orchestrator.db.results import Result
from orchestrator.spec.bodies import METADATA
from orchestrator.spec.chunks import Json


def completion(result: Result) -> Json:
    """The `chat.completion`, with the metadata that it was asked with, if any."""
    metadata = result.params.get(METADATA)
    found = export.completion(result)
    return found if metadata is None else {**found, METADATA: metadata}
