"""One slot of the KV cache: who has it, and which tokens' keys and values lie in it."""

import numpy as np

from llmtrt.runtime.request import Request


class CacheSlot:
    """``index``: its place in the batch. ``request``: whose it is, or None. ``turn``: which of all that were ever assigned
    to a slot it was. ``rows``: how many rows of the cache, from the first on, hold what ``tokens`` says, until the request
    decodes."""

    def __init__(self, index: int):
        self.index = index
        self.request: Request | None = None
        self.turn = self.rows = 0
        self._left = np.empty(0, np.int64)  # by requests that have gone

    @property
    def is_prefilling(self) -> bool:
        return self.request is not None and not self.request.token_ids

    @property
    def is_decoding(self) -> bool:
        return self.request is not None and bool(self.request.token_ids)

    def tokens(self) -> np.ndarray:
        """int64 [rows]: the token of each row. A request's last token is in none: the step that writes it also reads it."""
        if self.is_prefilling:
            return self.request.prompt[: self.rows]
        if self.is_decoding:
            return np.concatenate([self.request.prompt, self.request.token_ids[:-1]])
        return self._left[: self.rows]

    def assign(self, request: Request, turn: int, rows: int) -> None:
        """Gives the slot to ``request``, the first ``rows`` tokens of whose prompt are in its cache."""
        self.request, self.turn, self.rows = request, turn, rows

    def release(self) -> None:
        """Takes it from its request; what is in the cache stays."""
        self._left = self.tokens()
        self.request, self.rows = None, len(self._left)

    def forget(self) -> None:
        """What is in the cache is lost, or must not be read."""
        self.request, self.rows = None, 0


def shared_prefix(tokens: np.ndarray, others: np.ndarray) -> int:
    """The number of tokens that both begin with."""
    size = min(len(tokens), len(others))
    different = np.flatnonzero(tokens[:size] != others[:size])
    return int(different[0]) if len(different) else size
