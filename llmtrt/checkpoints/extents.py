"""Bytes of a file into memory of their own: never mapped, so that dropping an array gives its memory back."""

from pathlib import Path

import numpy as np

from llmtrt.errors import UserError


def read_extent(path: Path, offset: int, count: int) -> np.ndarray:
    """``count`` bytes of ``path`` from ``offset`` on, as uint8 [count]; UserError if the file ends before."""
    data = np.empty(count, np.uint8)
    view, done = memoryview(data), 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < count and (taken := file.readinto(view[done:])):
                done += taken
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if done < count:
        raise UserError(f"{path} is truncated: it ends {count - done} bytes early: download it again")
    return data


def row_range(name: str, shape: tuple[int, ...], rows: slice | None) -> range:
    """The rows of the first axis that ``rows`` (step 1, or None for all) asks of a tensor of ``shape``."""
    wanted = range(*(rows or slice(None)).indices(shape[0]))
    if wanted.step != 1:
        raise ValueError(f"{name}: rows should be a slice of step 1, but are {rows}")
    return wanted
