"""How much memory a process can still get."""

import os
from pathlib import Path

from llmtrt.errors import UserError

_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"), "inactive_file "),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        "total_inactive_file ",
    ),
)  # version 2, version 1: limit, use, and the part of the use in memory.stat that is only cached files


def available_bytes() -> int | None:
    """Bytes of main memory that can be taken without swapping, within the container's limit; None where none can
    tell."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    if not found:
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (ValueError, OSError, AttributeError):
            pass
    for limit, use, cached in _CGROUPS:
        try:
            stat = (limit.parent / "memory.stat").read_text().splitlines()
            files = sum(int(line.split()[1]) for line in stat if line.startswith(cached))
            found.append(int(limit.read_text()) - int(use.read_text()) + files)
        except (OSError, ValueError, IndexError):  # no such version, or "max"
            continue
    return max(0, min(found)) if found else None


def require(needed: int, what: str, remedy: str) -> None:
    """UserError with both numbers if ``needed`` bytes are more than what is available."""
    available = available_bytes()
    if available is not None and needed > available:
        raise UserError(
            f"{what} needs about {needed / 2**30:.2f} GiB of memory and {available / 2**30:.2f} GiB are available: "
            f"{remedy}"
        )
