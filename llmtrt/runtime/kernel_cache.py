"""Compiled kernels on disk: what TensorRT-RTX compiles for a plan when it first runs, kept for the next start."""

import hashlib
import os
from pathlib import Path
from typing import Any

from llmtrt import files
from llmtrt.engine.flavor import Flavor
from llmtrt.errors import UserError

FOLDER = "LLMTRT_CACHE"  # environment variable: where; empty for nowhere
_LARGEST = 1 << 30  # bytes


def default_folder() -> Path | None:
    """$LLMTRT_CACHE, or llmtrt in the user's cache folder; None where the variable is empty."""
    said = os.environ.get(FOLDER)
    if said is not None:
        return Path(said) if said else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmtrt"


class KernelCache:
    """The IRuntimeCache of one plan (https://docs.nvidia.com/deeplearning/tensorrt-rtx: "runtime cache"), read from and
    written to a file of ``folder``; it does nothing for a flavor that has none, or without a folder.

    ``key``: all that the kernels depend on: the plan's digest, TensorRT's version, GPU and driver. A file that TensorRT
    does not take is replaced.
    """

    def __init__(self, flavor: Flavor, folder: Path | None, *key: str):
        self._path = None
        if folder is not None and flavor.can("runtime_cache"):
            self._path = folder / f"{hashlib.sha256(chr(0).join(key).encode()).hexdigest()}.kernels"
        self._cache: Any = None
        self._size = 0

    def attach(self, config: Any) -> None:
        """Has the contexts that ``config``, an IRuntimeConfig, makes take kernels from here and leave theirs here."""
        if self._path is None:
            return
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            try:
                if self._path.stat().st_size <= _LARGEST and self._cache.deserialize(self._path.read_bytes()):
                    self._size = self._path.stat().st_size
            except OSError:
                pass  # there is none yet
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes what has been compiled since; a folder that cannot be written costs the next start its time, no more."""
        if self._cache is None:
            return
        content = self._cache.serialize()
        if content is None or content.nbytes == self._size:
            return
        try:
            with files.staged_file(self._path) as staging:
                staging.write_bytes(content)
            self._size = content.nbytes
        except UserError:
            return
