"""How fast one stream could be at most: every weight is read once a token.

Bytes of weights come from the model's graph, the bandwidth from a measurement that takes its turn
in every round, on as many threads. Knows nothing of systems.
"""

from pathlib import Path

import onnx

from workers.measuring.ceilings import read_bandwidth
from workers.measuring.costs import step_costs
from workers.running.machine import this_machine

BANDWIDTH_SECONDS = 1.0


def weight_bytes(graph: Path) -> int:
    """Read for one token; of an embedding that is not also the head, one row is."""
    return step_costs(onnx.load(graph, load_external_data=False).graph).weight_bytes


def bandwidth(threads: int) -> float:
    """Bytes a second."""
    return read_bandwidth(this_machine(), threads, BANDWIDTH_SECONDS)
