"""How long decode steps take, by when their tokens come."""

import time


class Pace:
    """``tokens``: those that came since the last step was told."""

    def __init__(self):
        self.tokens = 0
        self._last: float | None = None
        self._prepared, self._was_behind = 0, False

    def interrupt(self) -> None:
        """Something other than a decode step comes next, or came."""
        self._last, self._was_behind, self.tokens = None, False, 0

    def drained(self) -> None:
        """Nothing is under way any more: the next step runs behind none."""
        self._was_behind = False

    def step(self, prepared: int, behind: bool) -> tuple[int, float | None, bool]:
        """A step has ended: the tokens that came with it; the seconds since the step before it ended, None where something
        else came between or the device was made ready for a shape (``prepared`` has changed); and whether that is the time
        of one step in a row, with whatever is done about a token: it came right ``behind`` the one before, as that did."""
        now, last, tokens = time.perf_counter(), self._last, self.tokens
        in_a_row = behind and self._was_behind
        seconds = now - last if last is not None and prepared == self._prepared else None
        self._last, self._prepared, self._was_behind, self.tokens = now, prepared, behind, 0
        return tokens, seconds, in_a_row and seconds is not None
