"""The tokens of one call as they come."""

from collections.abc import Iterator, Sequence
from typing import Self

from llmtrt.errors import UserError
from llmtrt.runtime.request import Piece, Request


class Stream(Iterator[Piece]):
    """An iterator of ``Piece``; ``requests`` are the call's, in the order of its prompts."""

    def __init__(self, pieces: Iterator[Piece], requests: Sequence[Request]):
        self._pieces, self._requests = pieces, requests

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def cancel(self, index: int = 0) -> None:
        """Ends prompt ``index`` with what it has, and frees its place for one that waits; its last piece comes next, with
        "cancelled" for a reason. Nothing happens where it has ended. UserError where there is no such prompt."""
        if not 0 <= index < len(self._requests):
            raise UserError(f"there is no prompt {index} to cancel: the call has {len(self._requests)}, from 0 on")
        self._requests[index].cancelled = True

    def close(self) -> None:
        """Ends all that is left; the iterator has no more pieces."""
        self._pieces.close()
