"""What the machine has."""

import math
import re
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes() -> float:
    """What the system, and the container that it may be, still give; infinite where neither says."""
    return min(_of_system(), _of_container())


def _of_system() -> float:
    found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text()) if _MEMINFO.exists() else None
    return 1024.0 * int(found[1]) if found else math.inf


def _of_container() -> float:
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return math.inf
    return float(int(limit.read_text()) - int(used.read_text()))
