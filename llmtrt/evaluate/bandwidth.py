"""How fast memory is copied here: what a step that reads its weights once is measured by."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llmtrt.runtime.cuda import Cuda, Region

_HOST, _DEVICE = 256 << 20, 1 << 30  # bytes, more than caches hold
_TIMES = 10


def host_bandwidth(threads: int | None = None) -> float:
    """Bytes a second that a copy in main memory reads and writes together, on ``threads`` threads (None: one a core)."""
    threads = threads or len(os.sched_getaffinity(0))
    source, target = np.ones(_HOST, np.uint8), np.zeros(_HOST, np.uint8)
    parts = [*zip(np.array_split(source, threads), np.array_split(target, threads))]
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> float:
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts))
            return time.perf_counter() - start

        return 2 * _HOST / min(copy() for _ in range(_TIMES))


def device_bandwidth(gpu: int = 0) -> float:
    """The same of a copy in the memory of a GPU; UserError where there is none."""
    cuda = Cuda(gpu)
    try:
        source, target = (Region(cuda.allocate(_DEVICE), _DEVICE) for _ in range(2))
        cuda.copy(target, source)
        cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_TIMES):
            cuda.copy(target, source)
        cuda.synchronize()
        return 2 * _DEVICE * _TIMES / (time.perf_counter() - start)
    finally:
        cuda.close()
