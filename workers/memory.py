"""How much memory this process holds. Knows nothing of models or devices."""

import resource
from pathlib import Path


def resident_bytes() -> int:
    """Resident memory now; where the system does not tell, the most there ever was."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()
