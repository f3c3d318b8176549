"""Decoding on the device: decoder and sampler back to back in one CUDA graph, so that a token costs one launch, a check of
drafts two."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from llmtrt.runtime.context import Context
from llmtrt.runtime.cuda import Cuda, Region
from llmtrt.runtime.kv_cache import aligned
from llmtrt.runtime.params import SamplingParams
from llmtrt.runtime.read_once import mark
from llmtrt.runtime.sampling import Sampler
from llmtrt.runtime.session import Decoding

# int64 [slots] each. The sampler's outputs lie apart from its and the decoder's inputs, in the inputs' order, so that one
# copy at the end of a step makes them the next step's inputs.
_NOW = ("input_ids", "positions", "steps")
_NEXT = ("next_ids", "next_positions", "next_steps")
_FIXED = ("logits_index", "last_rows", "tokens")
_PARAMS = ("temperature", "repetition_penalty", "top_k", "top_p", "min_p")  # fp32 [slots] each
_NOBODYS = SamplingParams()
Contexts = tuple[Context, ...]  # of one step: the model's, and the sampler's where it chooses


class DecodeState:
    """What a decode step reads and writes beside weights and KV cache, on the device, for up to ``slots`` slots, each with
    noise for ``capacity`` steps."""

    def __init__(self, cuda: Cuda, slots: int, vocab_size: int, capacity: int):
        self._cuda, self._vocab_size, self._capacity = cuda, vocab_size, capacity
        sizes = dict.fromkeys((*_NOW, *_NEXT, *_FIXED), 8 * slots)
        sizes |= dict.fromkeys(_PARAMS, 4 * slots)
        sizes |= {"noise": 4 * slots * capacity, "seen": slots * vocab_size, "next_seen": slots * vocab_size}
        total = sum(map(aligned, sizes.values()))
        self._tokens, self._block = [], 0
        self._drawn_with: tuple[list[SamplingParams], int] | None = None  # what lies there of the latest ``draw``
        self._admitted: dict[int, tuple[Sampler, range]] = {}  # by slot: whose noise lies there, and of which steps
        try:
            for _ in range(2):
                self._tokens.append(cuda.pinned(slots, np.int64))
            self._block = cuda.allocate(total)
            cuda.zero(self._block, total, total, 1)  # a slot that nobody was admitted to computes something, too
        except BaseException:
            self.free()
            raise
        self._places, address = {}, self._block
        for name, size in sizes.items():
            self._places[name] = Region(address, size)
            address += aligned(size)

    def free(self) -> None:
        self._cuda.free(self._block)
        for array in self._tokens:
            self._cuda.free_pinned(array)

    def places(self) -> dict[str, Region]:
        """Where each of them lies, by the names of the decoder's and the samplers' tensors."""
        return self._places

    def feed(self, input_ids: np.ndarray, positions: np.ndarray) -> None:
        """The inputs of one decode step of the first B slots whose tokens the host chose, [B, 1] each."""
        self._put("input_ids", input_ids)
        self._put("positions", positions)
        self._put("logits_index", np.zeros(len(input_ids), np.int64))

    def admit(self, index: int, decoding: Decoding) -> None:
        """The inputs of slot ``index`` for its next step, and all that the sampler does not know of it yet."""
        params, sampler = decoding.params, decoding.sampler
        known, steps = self._admitted.get(index, (None, range(0)))
        if known is not sampler or sampler.step + decoding.steps > steps.stop:
            steps = range(sampler.step, sampler.step + min(decoding.steps, self._capacity))
            self._admitted.pop(index, None)
            self._place(index, last_rows=self._capacity - 1, logits_index=0)
            for name in _PARAMS:
                self._put(name, np.array([getattr(params, name)], np.float32), index)
            if not params.greedy:
                self._put("noise", sampler.noise(len(steps)), index * self._capacity)
            self._admitted[index] = sampler, steps
        self._place(index, input_ids=decoding.token, positions=decoding.position, steps=sampler.step - steps.start)
        if sampler.seen is not None:
            self._put("seen", sampler.seen, index * self._vocab_size)

    def draw(self, samplers: Sequence[Sampler | None], rows: int) -> None:
        """All that the sampler has to know of ``rows`` rows of each sequence, a slot each with noise for one step: row i is
        chosen with that of the sequence's step i from now. Nobody is admitted to these slots."""
        each = [_NOBODYS if sampler is None else sampler.params for sampler in samplers]
        if self._drawn_with != (each, rows):
            self._drawn_with = None
            for name in _PARAMS:
                self._put(name, np.array([getattr(params, name) for params in each], np.float32).repeat(rows))
            self._drawn_with = each, rows
        noise = [np.zeros(rows, np.float32) if sampler is None else sampler.noise(rows) for sampler in samplers]
        self._put("noise", np.concatenate(noise))

    def park(self, index: int, position: int) -> None:
        """Keeps slot ``index`` at ``position``."""
        self._admitted.pop(index, None)
        self._place(index, input_ids=0, positions=position, last_rows=position, logits_index=0)

    def advance(self, batch: int, sampled: bool) -> None:
        """Makes the sampler's outputs the next step's inputs; the last of a captured step."""
        places, count = self._places, len(_NOW) if sampled else 2
        start, end = places[_NEXT[0]], places[_NEXT[count - 1]]
        self._cuda.copy(places[_NOW[0]], Region(start.address, end.address + end.size - start.address))
        if sampled:
            self._cuda.copy(places["seen"], Region(places["next_seen"].address, batch * self._vocab_size))

    def fetch(self, turn: int, batch: int) -> np.ndarray:
        """Puts the copy of the last step's tokens to the host on the stream; they may be read once it has run."""
        tokens = self._tokens[turn % 2][:batch]
        self._cuda.download(tokens, self._places["tokens"].address)
        return tokens

    def _place(self, index: int, **values: int) -> None:
        for name, value in values.items():
            self._put(name, np.array([value], np.int64), index)

    def _put(self, name: str, array: np.ndarray, start: int = 0) -> None:
        """Writes ``array`` from element ``start`` on."""
        # CUDA has read pageable memory when the call returns, so the array may go.
        self._cuda.upload(self._places[name].address + start * array.itemsize, np.ascontiguousarray(array))


class DecodeLoop:
    """Runs decode steps, each behind the one before, and checks. Graphs are kept until ``forget``: of a step one for each
    number of slots, context bucket and kind of sampler; of checks one for each number of slots and rows and bucket, and one
    for each number of rows in all and kind of sampler.

    ``decoder(slots, bucket, sampled)`` gives the contexts of a step, model and sampler (``sampled`` None: the model alone;
    False: the sampler of the likeliest token), ready to run; ``checker(slots, rows, bucket)`` that of the model of a check,
    and ``chooser(rows, sampled)`` that of the sampler of as many rows. ``captures``: without, each step is put on the stream
    anew. ``read_once()``: the weights and the caches, which a step reads once.

    Nothing of a token's way touches the host. It reads tokens one step behind, while the next step runs; what was computed
    past a stop is discarded.
    """

    def __init__(
        self,
        cuda: Cuda,
        decoder: Callable[[int, int, bool | None], Contexts],
        checker: Callable[[int, int, int], Contexts],
        chooser: Callable[[int, bool], Contexts],
        captures: bool,
        read_once: Callable[[], tuple[Sequence[Region], Sequence[Region]]],
    ):
        self._cuda, self._decoder, self._checker, self._chooser = cuda, decoder, checker, chooser
        self._captures, self._read_once = captures, read_once
        self._graphs: dict[tuple, object] = {}
        self._ran: set[tuple] = set()  # those that could not be captured before
        self._events = [cuda.event() for _ in range(2)]
        self._turn = self.captured = 0
        self._under_way: deque[tuple[object, np.ndarray]] = deque()

    def forget(self) -> None:
        """Drops the graphs: memory that they use has moved."""
        if self._graphs:
            self._cuda.drop_graphs()
        self._graphs, self._ran = {}, set()

    def close(self) -> None:
        """Lets go of the contexts, once the session's CUDA has destroyed the graphs."""
        self._graphs = {}

    def discard(self) -> None:
        """Nobody asks for the tokens of the steps under way."""
        self._under_way.clear()

    def start(self, state: DecodeState, slots: int, bucket: int, sampled: bool) -> None:
        """Puts one step of the first ``slots`` slots on the stream."""
        if len(self._under_way) == len(self._events):
            raise ValueError("two steps are under way: ask for the tokens of the first")
        contexts = partial(self._decoder, slots, bucket, sampled)
        self._launch(("step", slots, bucket, sampled), contexts, partial(state.advance, slots, sampled))
        tokens, event = state.fetch(self._turn, slots), self._events[self._turn % 2]
        self._cuda.record(event)
        self._under_way.append((event, tokens))
        self._turn += 1

    def tokens(self) -> np.ndarray:
        """Waits for the earliest step under way: int64 [slots]; −1: the logits were not numbers."""
        event, tokens = self._under_way.popleft()
        self._cuda.wait(event)
        return tokens.copy()

    def check(self, slots: int, rows: int, bucket: int, sampled: bool | None) -> None:
        """As ``start``, one step of ``rows`` rows of each slot, which ends with the logits of all (``sampled`` None) or with
        the token behind each; inputs and outputs are where ``checker`` and ``chooser`` bound them."""
        self._launch(("check", slots, rows, bucket), partial(self._checker, slots, rows, bucket))
        if sampled is not None:
            count = slots * rows
            self._launch(("choose", count, sampled), partial(self._chooser, count, sampled))

    def logits(self, slots: int, bucket: int) -> None:
        """As ``start``, one step that ends with its logits."""
        self._launch(("step", slots, bucket, None), partial(self._decoder, slots, bucket, None))

    def _launch(self, key: tuple, contexts: Callable[[], Contexts], after: Callable[[], None] = lambda: None) -> None:
        """What ``contexts`` compute and what ``after`` puts on the stream behind them, from the graph of ``key``."""
        if key not in self._graphs:
            contexts()
            found = contexts()  # to make the second ready may move the activations that the first was told of

            def step() -> None:
                for context in found:
                    context.run()
                after()

            if not self._captures:
                step()
                return
            try:
                graph = self._cuda.capture(step, lambda graph: mark(graph, *self._read_once()))
            except RuntimeError:  # what TensorRT cannot set up while it is captured it sets up in a run
                if key in self._ran:
                    raise
                self._ran.add(key)
                step()
                return
            self._graphs[key] = graph
            self.captured += 1
        self._cuda.launch(self._graphs[key])
