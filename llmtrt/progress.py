"""One way to show long work: a rich bar on a terminal, a plain line now and then elsewhere, always on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_PLAIN_SECONDS = 10.0


class Report(Protocol):
    """What long work calls: ``report(done, total, note)``; done and total share a unit of the caller's choice."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def silent(done: int, total: int, note: str = "") -> None:
    """A Report that shows nothing: the default of every function of the API."""


@contextmanager
def shown(title: str) -> Iterator[Report]:
    """Yields a Report that a person can watch; used by the command line, never by the library."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None, note="")
            yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)
        return
    start = last = time.monotonic()
    first: int | None = None  # done at the start of a run that goes on from an earlier one

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal first, last
        now = time.monotonic()
        first = done if first is None else first
        if now - last >= _PLAIN_SECONDS or (done == total and now - start >= _PLAIN_SECONDS):
            last = now
            going = first < done < total
            left = f", about {(now - start) * (total - done) / (done - first):.0f} s left" if going else ""
            print(f"{title}: {done}/{total} ({now - start:.0f} s{left}) {note}".rstrip(), file=sys.stderr, flush=True)

    yield report
