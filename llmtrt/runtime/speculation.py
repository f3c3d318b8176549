"""Speculative decoding: whether and how far ahead tokens are guessed, so that one step can check several."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from llmtrt.runtime.request import Request

_REST, _LONGEST_REST = 64, 256  # steps without a draft where drafts lost, doubled each time in a row
_WAIT, _LONGEST_WAIT = 64, 256  # steps until a kind of draft that does not pay is tried again, doubled likewise
_JUDGED = 6  # steps from the first draft, after which what came is compared with what comes without
_LOSS = 0.97  # of that, where it is called less
_SAMPLES = 5  # times of steps of one size that are kept; their median counts, since other programs run now and then
_FEWEST = 3  # of a step of one row, before a draft is asked for
_LONGEST_STEP = 4  # times the slowest that is known
_OLD = 256  # steps, after which the time of a step of one row is measured again
_MEMORY = 0.95  # of what was seen, from one draft or step to the next
_FASTER = 1.02  # what drafts have to promise
_FADES = 0.9995  # a time, with every step that goes by, so that what was slow once is tried again
_GUESS = (1.0, 2.0)  # tokens that were right and tokens that were checked, before any were


@dataclass(frozen=True)
class Draft:
    """``tokens`` that may follow. ``kind``: drafts of one kind are about as often right."""

    tokens: Sequence[int] = ()
    kind: Hashable = None


NOTHING = Draft()


class Drafter(Protocol):
    """Guesses the tokens of one request; a prompt's own text, or another model."""

    def draft(self, token_ids: Sequence[int], most: int) -> Draft:
        """At most ``most`` tokens that may follow ``token_ids``, which begin with those of the call before."""


class PromptLookup:
    """Guesses what followed the last time that the last few tokens came (prompt lookup decoding, Saxena 2023; Yang et al.
    2023, "Inference with reference", arXiv:2304.04487).

    ``longest``, ``shortest``: the number of tokens that have to match, the longest match counting first.
    """

    def __init__(self, longest: int = 4, shortest: int = 2):
        self._sizes = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → where its latest follower stands
        self._seen = 0

    def draft(self, token_ids: Sequence[int], most: int) -> Draft:
        """See ``Drafter``; where the match runs into the end, what it begins repeats."""
        length = len(token_ids)
        for place in range(max(1, self._seen), length):
            for size in self._sizes:
                if size <= place:
                    self._after[tuple(token_ids[place - size : place])] = place
        self._seen = length
        for size in self._sizes:
            place = self._after.get(tuple(token_ids[length - size :])) if size <= length else None
            if place is not None:
                period = length - place
                return Draft([token_ids[place + index % period] for index in range(most)], size)
        return NOTHING


@dataclass(frozen=True)
class _Times:
    samples: tuple[float, ...]  # seconds
    at: int  # after how many steps the last was measured

    @property
    def seconds(self) -> float | None:
        return median(self.samples) if self.samples else None


@dataclass(frozen=True)
class _Given:
    """What steps gave since the first draft behind a rest, the latest counting most."""

    sequences: int
    steps: int
    tokens: float
    seconds: float


_NONE_GIVEN = _Given(0, 0, 0.0, 0.0)


class Speculation:
    """Asks a drafter for each request, and lets a step have as many rows as promise the most tokens a second, from how
    long steps of that many rows took and how often drafts of their kind were right. A kind that promises no more than one
    row does is left, but for a short one now and then that shows whether that is still so. Where what came was less than
    steps of one row, one right behind the other, give, it rests.

    ``steps``, ``drafted``, ``accepted``: steps with a draft, the tokens of these, and those that were right.
    """

    def __init__(self, drafter: Callable[[], Drafter] = PromptLookup):
        self._make = drafter
        self._known: dict[int, tuple[Drafter, list[int]]] = {}  # by the request's id, until it is forgotten
        self._times: dict[tuple[int, int], _Times] = {}  # of a step, by its sequences and the rows of each
        self._now = 0  # steps so far
        self._right: dict[Hashable, tuple[float, float]] = {}  # by kind
        self._rest, self._next_rest = 0, _REST
        self._step, self._trial_at = 0, _WAIT  # the one that comes, and from which on a kind may be tried
        self._waits: dict[Hashable, tuple[int, int]] = {}  # by kind: until which step, and how long the next time
        self._tried: frozenset[Hashable] = frozenset()  # kinds that the latest drafts were to show something of
        self._checked = self._hits = 0
        self._asked = False  # whether the step that comes has a drafter's time in it
        self._given: _Given | None = None  # until a draft was checked
        self.steps = self.drafted = self.accepted = 0

    def rests(self) -> bool:
        """Whether the next step, which this counts, is to go without a draft."""
        self._step += 1
        self._asked = False
        if self._rest:
            self._rest -= 1
            return True
        return False

    def drafts(self, requests: Sequence[Request], sizes: Sequence[int]) -> tuple[int, list[Draft]]:
        """A draft for each of ``requests``, and the rows of the step that checks them: one of ``sizes``, which ascend from 2
        on at least, or 1 where no draft has a token."""
        self._judge_trial()
        count, nothing = len(requests), (1, [NOTHING] * len(requests))
        if self._loses():
            self._rest, self._given = self._next_rest, None
            self._next_rest = min(2 * self._next_rest, _LONGEST_REST)
            return nothing
        one = self._times.get((count, 1))
        if not sizes or one is None or len(one.samples) < _FEWEST:
            return nothing
        if self._now - one.at > _OLD:
            self._times[count, 1] = _Times(one.samples, self._now)  # asked for once, as prefill may prevent it
            self._rest = _SAMPLES + 2  # the first fill the queue
            return nothing
        self._asked = True
        found = [self._draft(request, min(sizes[-1], request.left) - 1) for request in requests]
        if not any(draft.tokens for draft in found):
            return nothing
        rows = self._rows(found, sizes)
        if rows == 1:
            self._tried = frozenset(draft.kind for draft in found if draft.tokens and self._may_try(draft.kind))
            if not self._tried:
                return nothing
            rows = sizes[0]
        found = [Draft(draft.tokens[: rows - 1], draft.kind) for draft in found]
        longest = max(len(draft.tokens) for draft in found)
        return next(rows for rows in sizes if rows > longest), found

    def gave(self, sequences: int, tokens: int, seconds: float) -> None:
        """So many tokens of ``sequences`` came in the time since the step before, whatever that was spent on."""
        if self._given is None:
            return
        known = [times.seconds for (count, _), times in self._times.items() if count == sequences and times.samples]
        if known:  # no more than that of a pause, as of whoever reads the tokens
            seconds = min(seconds, _LONGEST_STEP * max(known))
        before = self._given if self._given.sequences == sequences else _NONE_GIVEN
        self._given = _Given(
            sequences,
            before.steps + 1,
            before.tokens * _MEMORY + tokens,
            before.seconds * _MEMORY + seconds,
        )

    def measured(self, sequences: int, rows: int, seconds: float) -> None:
        """A step of ``sequences`` with ``rows`` rows each took that long; of one row, right behind another. What a drafter
        took for nothing is no part of a step without one."""
        self._now += 1
        if rows == 1 and self._asked:
            return
        known = self._times.get((sequences, rows))
        # The first of a shape may compile and allocate.
        samples = () if known is None else (*known.samples, seconds)[-_SAMPLES:]
        self._times[sequences, rows] = _Times(samples, self._now)

    def seconds(self, sequences: int, rows: int) -> float | None:
        """Of such a step, as far as is known; None where it was not seen twice."""
        known = self._times.get((sequences, rows))
        if known is None or known.seconds is None:
            return None
        # That of one row is measured again, and not believed less till then.
        return known.seconds * (1 if rows == 1 else _FADES ** (self._now - known.at))

    def forget(self, requests: Sequence[Request]) -> None:
        """Drops what is kept for ``requests``: no more drafts of theirs are asked for."""
        for request in requests:
            self._known.pop(id(request), None)
        # What comes next may be another kind of text.
        self._rest, self._next_rest = min(self._rest, _REST), _REST
        self._trial_at = min(self._trial_at, self._step + _WAIT)
        self._waits = {kind: (min(until, self._step + _WAIT), _WAIT) for kind, (until, _) in self._waits.items()}

    def verified(self, draft: Draft, accepted: int) -> None:
        """``accepted`` tokens of ``draft``, from its start, were right."""
        right, checked = self._right.get(draft.kind, _GUESS)
        self._right[draft.kind] = (
            right * _MEMORY + accepted,
            checked * _MEMORY + min(accepted + 1, len(draft.tokens)),
        )
        self._given = self._given or _NONE_GIVEN
        self._checked += 1
        self._hits += accepted > 0
        self.steps += 1
        self.drafted += len(draft.tokens)
        self.accepted += accepted

    def _draft(self, request: Request, most: int) -> Draft:
        if most < 1:
            return NOTHING
        if id(request) not in self._known:
            self._known[id(request)] = self._make(), request.prompt.tolist()
        drafter, token_ids = self._known[id(request)]
        token_ids += request.token_ids[len(token_ids) - len(request.prompt) :]
        return drafter.draft(token_ids, most)

    def _judge_trial(self) -> None:
        """Kinds whose latest trial was all wrong wait longer than before."""
        if self._tried and self._checked and not self._hits:
            self._trial_at, self._given = self._step + _WAIT, None
            for kind in self._tried:
                _, wait = self._waits.get(kind, (0, _WAIT))
                self._waits[kind] = self._step + wait, min(2 * wait, _LONGEST_WAIT)
        self._tried, self._checked, self._hits = frozenset(), 0, 0

    def _may_try(self, kind: Hashable) -> bool:
        return self._step >= max(self._trial_at, self._waits.get(kind, (0, 0))[0])

    def _loses(self) -> bool:
        """Whether fewer tokens came than without drafts; where more did, the next rest is a short one."""
        given = self._given
        one = self.seconds(given.sequences, 1) if given else None
        if one is None or given.steps < _JUDGED:
            return False
        ratio = given.tokens / given.sequences * one / given.seconds
        if ratio >= _FASTER:
            self._next_rest = _REST
        return ratio < _LOSS - 1 / given.steps  # few say little

    def _rows(self, drafts: list[Draft], sizes: Sequence[int]) -> int:
        """The number of rows that promises the most tokens a second."""
        count = len(drafts)
        seconds = self.seconds(count, 1)
        best, rate = 1, _FASTER * count / seconds
        for rows in sizes:
            known = self.seconds(count, rows)
            # Not known: no longer than with fewer rows, so that it is tried where that may pay.
            seconds = known or seconds
            tokens = sum(self._expected(draft, rows - 1) for draft in drafts)
            if tokens / seconds > rate:
                best, rate = rows, tokens / seconds
            if known is None:
                break
        return best

    def _expected(self, draft: Draft, most: int) -> float:
        """Tokens of a step that checks the first ``most`` tokens of ``draft``: one, and those that are right before the
        first that is not."""
        right, checked = self._right.get(draft.kind, _GUESS)
        return 1 + sum((right / checked) ** place for place in range(1, min(most, len(draft.tokens)) + 1))
