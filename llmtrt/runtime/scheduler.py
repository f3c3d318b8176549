"""Which requests run in which slots, and what each step computes: continuous batching with chunked prefill.

A finished request's slot is refilled while the others go on (Yu et al. 2022, "Orca", OSDI), and prompts are prefilled in
chunks between decode steps, so that nobody waits for a long one (Agrawal et al. 2023, "SARATHI", arXiv:2308.16369).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count

import numpy as np

from llmtrt.runtime.cache_slot import CacheSlot, shared_prefix
from llmtrt.runtime.pace import Pace
from llmtrt.runtime.request import Piece, Request
from llmtrt.runtime.session import DeviceSession, Session
from llmtrt.runtime.speculation import NOTHING, Draft, Speculation

_CHECKS = (2, 4, 8, 16)  # rows of a step that checks drafts on a CPU, which takes longer the more they are
# Rows of a prefix that are worth copying from another slot, or waiting for where another's prefill comes to them.
_WORTHWHILE = 16


class Scheduler:
    """Runs requests on ``session``, for one caller at a time, and knows what lies in its cache between one run and the next.

    ``reuse_prefixes``: a prompt whose start is in the cache, of whichever request, is prefilled from where it differs.
    Its keys and values are then those of another chunking, which may differ in their last bits from those of a cold start.
    ``speculation``: drafts that several tokens of a step are checked against; None: one token a step.
    """

    def __init__(self, session: Session, reuse_prefixes: bool = True, speculation: Speculation | None = None):
        self._session, self._reuses, self.speculation = session, reuse_prefixes, speculation
        self._slots: list[CacheSlot] = []  # of the cache, those in use and others that hold something
        self._usable = 0  # of them, by this run
        self._waiting: deque[Request] = deque()
        self._turns = count()
        self._device = _Device(session) if isinstance(session, DeviceSession) else None
        self._check_rows = session.check_rows if self._device else session.chunk
        self._pace = Pace()

    def run(self, requests: Sequence[Request], slots: int) -> Iterator[Piece]:
        """Runs ``requests``, at most ``slots`` at a time, and yields each token as it comes. A request that is cancelled
        ends with a piece that says so; closing the iterator ends them all.

        Raises UserError as ``Session.reserve`` and ``Sampler.choose`` do.
        """
        self._usable = min(slots, len(requests))
        self._waiting = deque(requests)
        self._pace.interrupt()
        try:
            self._reserve(self._usable, max(len(request.prompt) + request.most_tokens for request in requests))
            while True:
                yield from self._cancel()
                self._admit()
                prefilling = self._those("is_prefilling")
                if prefilling:
                    yield from self._prefill(prefilling)
                    self._pace.interrupt()
                decoding = self._those("is_decoding")
                if decoding:
                    yield from self._decode(decoding)
                elif not prefilling:
                    return
        except GeneratorExit:
            raise
        except BaseException:
            self.forget()  # nobody knows what was written, and NaN must reach no other request
            raise
        finally:
            for slot in self._slots:
                self._release(slot)
            self._waiting.clear()
            if self.speculation:
                self.speculation.forget(requests)

    def logits(self, token_ids: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """As ``logits_of``; what was in the cache is gone."""
        self.forget()
        return logits_of(self._session, token_ids, rows)

    def forget(self) -> None:
        """Nothing that is in the cache is used again."""
        for slot in self._slots:
            slot.forget()

    def _reserve(self, slots: int, max_seq: int) -> None:
        keep = [slot.rows for slot in self._slots] if self._reuses else []
        kept = self._session.reserve(slots, max_seq, keep)
        del self._slots[kept if any(keep) else 0 :]
        self._slots += [CacheSlot(index) for index in range(len(self._slots), slots)]
        if self._device:
            self._device.reset()

    def _those(self, state: str) -> list[CacheSlot]:
        return [slot for slot in self._slots[: self._usable] if getattr(slot, state)]

    def _release(self, slot: CacheSlot) -> None:
        if slot.request is not None:
            slot.release()
        if not self._reuses:
            slot.forget()

    def _cancel(self) -> Iterator[Piece]:
        for request in [request for request in self._waiting if request.cancelled]:
            self._waiting.remove(request)
            yield request.cancel()
        for slot in self._slots:
            if slot.request is not None and slot.request.cancelled:
                request = slot.request
                self._release(slot)
                yield request.cancel()

    def _admit(self) -> None:
        """Gives free slots to waiting requests, in their order, but for those whose prompt's start is being prefilled."""
        free = [slot for slot in self._slots[: self._usable] if slot.request is None]
        in_use = min(self._usable, self._usable - len(free) + len(self._waiting))
        later = []
        held = {slot: slot.tokens() for slot in self._slots} if free and self._waiting and self._reuses else {}
        while free and self._waiting:
            request = self._waiting.popleft()
            source, rows, is_coming = self._longest_prefix(request.prompt, held)
            if is_coming:
                later.append(request)
                continue
            # The lowest slots, since a step runs all up to the highest in use; but what is in place need not be copied.
            target = source if source in free and source.index < in_use else free[0]
            if source is not target:
                if rows < _WORTHWHILE:
                    rows = 0
                else:
                    self._session.copy_rows(source.index, target.index, rows)
            # What others left behind the rows that count may be NaN, and has weight 0 in attention until it is overwritten.
            self._session.clear_rows(target.index, rows)
            free.remove(target)
            target.assign(request, next(self._turns), rows)
            held[target] = target.tokens()
        self._waiting.extendleft(reversed(later))

    def _longest_prefix(
        self, prompt: np.ndarray, held: dict[CacheSlot, np.ndarray]
    ) -> tuple[CacheSlot | None, int, bool]:
        """Of the slots that hold ``held``, the one with most rows of ``prompt``'s start, how many, and whether it is better
        to wait for those that are being prefilled. The last token's row is never among them: its logits are wanted."""
        start, best, rows, settled, coming = prompt[:-1], None, 0, 0, 0
        if not self._reuses:
            return None, 0, False
        for slot, tokens in held.items():
            found = shared_prefix(start, tokens)
            if found > rows or (found == rows > 0 and slot.request is None and best.request is not None):
                best, rows = slot, found
            if slot.is_prefilling:
                coming = max(coming, shared_prefix(start, slot.request.prompt))
            else:
                settled = max(settled, found)
        return best, rows, coming > rows and coming >= settled + _WORTHWHILE

    def _prefill(self, prefilling: list[CacheSlot]) -> Iterator[Piece]:
        """One chunk of the prompt that came first, and with it of those in the slots that follow without a gap."""
        oldest = min(prefilling, key=lambda slot: slot.turn)
        group = [slot for slot in prefilling if slot.index >= oldest.index]
        group = [slot for place, slot in enumerate(group) if slot.index == oldest.index + place][: self._session.chunk]
        first, lengths = group[0].index, np.array([[len(slot.request.prompt)] for slot in group])
        done = np.array([[slot.rows] for slot in group])
        rows = min(self._session.chunk // len(group), int((lengths - done).max()))
        input_ids = np.zeros((len(group), rows), np.int64)
        for place, slot in enumerate(group):
            part = slot.request.prompt[slot.rows : slot.rows + rows]
            input_ids[place, : len(part)] = part
        last = lengths - 1 - done
        logits = self._session.step(input_ids, done + np.arange(rows), np.clip(last, 0, rows - 1), first)
        for slot in group:
            slot.rows = min(slot.rows + rows, len(slot.request.prompt))
            if self._device:
                self._device.stale(slot)
        for place, slot in enumerate(group):
            if last[place, 0] < rows and not slot.request.cancelled:
                yield self._took(slot, slot.request.accept(logits[place, 0]))

    def _took(self, slot: CacheSlot, piece: Piece) -> Piece:
        self._pace.tokens += 1
        if piece.completion is not None:
            self._release(slot)
        return piece

    def _decode(self, decoding: list[CacheSlot]) -> Iterator[Piece]:
        on_host = self._device is None or any(slot.request.wants_logits for slot in decoding)
        rests = self.speculation is None or self.speculation.rests()
        rows, drafts = (1, []) if rests else self._drafts(decoding)
        if self._device and self._device.under_way and (on_host or rows > 1):
            yield from self._settle()
            decoding = self._those("is_decoding")
            if decoding and rows > 1:
                rows, drafts = self._drafts(decoding)  # they continue the newest token
        if decoding and (on_host or rows > 1):
            yield from self._decode_and_wait(decoding, rows, drafts if rows > 1 else [NOTHING] * len(decoding))
        elif decoding:
            yield from self._decode_on_device(decoding)

    def _drafts(self, decoding: list[CacheSlot]) -> tuple[int, list[Draft]]:
        """As ``Speculation.drafts``, one for each of ``decoding``."""
        return self.speculation.drafts([slot.request for slot in decoding], self._sizes(decoding))

    def _sizes(self, decoding: list[CacheSlot]) -> list[int]:
        """The rows of each of ``decoding`` that a step may check drafts in; padding fills a size up."""
        if self._device is None:
            return [rows for rows in _CHECKS if rows <= self._check_rows]
        together = self._check_rows if _are_drawn(decoding) else self._session.most_checked
        most = min(self._check_rows, together // self._count(decoding))
        # Each is a shape that has to be made ready, and few rows take a GPU hardly less time than some more.
        return [rows for rows in (most // 4, most) if rows > 1]

    def _decode_on_device(self, decoding: list[CacheSlot]) -> Iterator[Piece]:
        """Starts the next step, and takes the tokens of the one before, which has run meanwhile."""
        before, slots = self._device.under_way, self._count(decoding)
        self._device.decode(slots, decoding, self._parked(decoding, slots))
        if self._device.under_way in (before, 2):
            yield from self._take(self._device.tokens())
            self._stepped(len(decoding), behind=True)

    def _settle(self) -> Iterator[Piece]:
        """The tokens of all steps that are under way on the device."""
        while self._device.under_way:
            yield from self._take(self._device.tokens())
        self._pace.drained()

    def _take(self, tokens: list[tuple[CacheSlot, Request, int]]) -> Iterator[Piece]:
        for slot, request, token in tokens:
            # Or it has finished, and the slot may be another's by now.
            if slot.request is request and not request.cancelled:
                yield self._took(slot, request.take(token))

    def _decode_and_wait(self, decoding: list[CacheSlot], rows: int, drafts: list[Draft]) -> Iterator[Piece]:
        """One step of ``rows`` rows each, whose tokens the host has before the next begins: each slot's last token, and
        behind it its draft.

        A draft's token is right where it is the one that is chosen anyway, from the logits of the row before, with the
        noise of that step: so the tokens are those that would come one by one, sampled ones too, as far as the logits of a
        step of several rows are those of one (Leviathan et al. 2023, arXiv:2211.17192, whose rule this is for a draft
        without a distribution).
        """
        slots = self._count(decoding)
        input_ids, starts = np.zeros((slots, rows), np.int64), np.zeros((slots, 1), np.int64)
        for slot, position in self._parked(decoding, slots).items():
            starts[slot.index] = position
        for slot, draft in zip(decoding, drafts):
            input_ids[slot.index, : 1 + len(draft.tokens)] = [slot.request.token_ids[-1], *draft.tokens]
            starts[slot.index] = slot.request.length - 1
        places = np.arange(rows)
        began, prepared = time.perf_counter(), self._session.prepared if self._device else 0
        if self._device and rows > 1:
            chosen, take = self._checked(decoding, input_ids, starts + places)
        else:
            wanted = np.broadcast_to(places, (slots, rows))
            chosen, take = self._session.step(input_ids, starts + places, wanted), _accept
        takes = [partial(take, slot.request, chosen[slot.index]) for slot in decoding]
        self._measured(len(decoding), rows, began, prepared)
        if self._device:
            for slot in self._slots[:slots]:
                self._device.stale(slot)
        for slot, draft, take in zip(decoding, drafts, takes):
            yield from self._verified(slot, draft, take)
        self._stepped(len(decoding), behind=rows == 1)

    def _checked(
        self, decoding: list[CacheSlot], input_ids: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, Callable[[Request, np.ndarray, int], Piece]]:
        """The token behind each row of a step of several, where the device can choose it, or the logits; and how a request
        takes it."""
        requests = {slot.index: slot.request for slot in decoding}
        if _are_drawn(decoding):
            samplers = [requests[index].sampler if index in requests else None for index in range(len(input_ids))]
            return self._session.drawn(input_ids, positions, samplers), _take
        if all(request.is_greedy and not request.wants_logits for request in requests.values()):
            return self._session.likeliest(input_ids, positions), _take
        return self._session.row_logits(input_ids, positions), _accept

    def _stepped(self, sequences: int, behind: bool) -> None:
        """Reports what a step gave, and how long one of one row takes that came right ``behind`` another."""
        if self.speculation is None:
            return
        tokens, seconds, in_a_row = self._pace.step(self._session.prepared if self._device else 0, behind)
        if in_a_row:
            self.speculation.measured(sequences, 1, seconds)
        if seconds is not None:
            self.speculation.gave(sequences, tokens, seconds)

    def _measured(self, sequences: int, rows: int, began: float, prepared: int) -> None:
        """Reports how long a step that checked drafts took, unless the device had to be made ready for it."""
        if rows > 1 and self.speculation and not (self._device and self._session.prepared != prepared):
            self.speculation.measured(sequences, rows, time.perf_counter() - began)

    def _verified(self, slot: CacheSlot, draft: Draft, take: Callable[[int], Piece]) -> Iterator[Piece]:
        """``take(row)`` gives the request the token that follows a row of the step."""
        accepted = 0
        for row in range(1 + len(draft.tokens)):
            if slot.request.cancelled:
                return
            piece = self._took(slot, take(row))
            is_right = row < len(draft.tokens) and piece.token_id == draft.tokens[row]
            accepted += is_right
            if not is_right or piece.completion is not None:
                break
            yield piece
        if draft.tokens:
            self.speculation.verified(draft, accepted)
        yield piece

    def _count(self, decoding: list[CacheSlot]) -> int:
        """The slots of a step that decodes those: all up to the highest; on a device, which keeps a graph for each number,
        up to the next power of two."""
        slots = decoding[-1].index + 1
        return min(1 << (slots - 1).bit_length(), self._usable) if self._device else slots

    def _parked(self, decoding: list[CacheSlot], slots: int) -> dict[CacheSlot, int]:
        """Where those of the first ``slots`` slots write that are not in ``decoding``. Slots that nobody has keep no more
        rows than the longest that decodes, so that a step costs no more for what they remember."""
        longest = max(slot.request.length for slot in decoding)
        places = {}
        for slot in self._slots[:slots]:
            if slot not in decoding:
                if slot.request is None:
                    slot.rows = min(slot.rows, longest)
                places[slot] = slot.rows
        return places


def _are_drawn(decoding: list[CacheSlot]) -> bool:
    """Whether a device draws the tokens of a check: some are sampled, and none hangs on those of the rows before, as with a
    penalty, or is to be seen by the host."""
    requests = [slot.request for slot in decoding]
    return not all(request.is_greedy for request in requests) and not any(
        request.penalizes or request.wants_logits for request in requests
    )


def _take(request: Request, tokens: np.ndarray, row: int) -> Piece:
    return request.take(int(tokens[row]))


def _accept(request: Request, logits: np.ndarray, row: int) -> Piece:
    return request.accept(logits[row])


def logits_of(session: Session, token_ids: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Logits, fp32 [≤ rows, V], of each token of one sequence, int64 [S], from its start; ``rows`` is the session's chunk
    at most."""
    rows = min(rows, session.chunk)
    session.reserve(1, len(token_ids))
    for start in range(0, len(token_ids), rows):
        part = token_ids[None, start : start + rows]
        places = np.arange(part.shape[1])[None]
        yield session.step(part, start + places, places)[0]


class _Device:
    """What the device was told of the slots, and the steps that are under way on it."""

    def __init__(self, session: DeviceSession):
        self._session = session
        self.reset()

    def reset(self) -> None:
        """Nothing is under way, and the device knows nothing."""
        self._admitted: dict[int, Request] = {}
        self._parked: dict[int, int] = {}
        self._steps: deque[list[tuple[CacheSlot, Request]]] = deque()

    def stale(self, slot: CacheSlot) -> None:
        """The device no longer knows what ``slot`` decodes."""
        self._admitted.pop(slot.index, None)
        self._parked.pop(slot.index, None)

    @property
    def under_way(self) -> int:
        return len(self._steps)

    def decode(self, slots: int, decoding: list[CacheSlot], parked: dict[CacheSlot, int]) -> None:
        """Starts a step of the first ``slots`` slots for those of ``decoding`` that lack more tokens than are under way;
        none where no one does."""
        under_way = [(slot, sum((slot, slot.request) in step for step in self._steps)) for slot in decoding]
        wanted = [(slot, ahead) for slot, ahead in under_way if slot.request.left > ahead]
        if not wanted:
            return
        for slot in decoding:
            if self._admitted.get(slot.index) is not slot.request:
                self._session.admit(slot.index, slot.request.decoding())
                self._admitted[slot.index] = slot.request
                self._parked.pop(slot.index, None)
        for slot, position in parked.items():
            if self._parked.get(slot.index) != position:
                self._session.park(slot.index, position)
                self._admitted.pop(slot.index, None)
                self._parked[slot.index] = position
        # Those who lack no more count too: a row that its window hides everything from would be NaN, and be cached.
        length = max(slot.request.length + ahead for slot, ahead in under_way)
        length = max([length, *(position + 1 for position in parked.values())])
        greedy = all(slot.request.is_greedy for slot, _ in wanted)
        self._session.decode(slots, length, greedy)
        self._steps.append([(slot, slot.request) for slot, _ in wanted])

    def tokens(self) -> list[tuple[CacheSlot, Request, int]]:
        """The tokens of the earliest step under way."""
        tokens = self._session.tokens().tolist()
        return [(slot, request, tokens[slot.index]) for slot, request in self._steps.popleft()]
