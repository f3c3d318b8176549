"""Decoding on the device: decoder and sampler back to back in one CUDA graph, so that a token costs one launch."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llmtrt.runtime.context import Context
from llmtrt.runtime.cuda import Cuda, Region
from llmtrt.runtime.kv_cache import aligned
from llmtrt.runtime.session import Slot

# int64 [slots] each. The sampler's outputs lie apart from its and the decoder's inputs, in the inputs' order, so that one
# copy at the end of a step makes them the next step's inputs.
_NOW = ("input_ids", "positions", "steps")
_NEXT = ("next_ids", "next_positions", "next_steps")
_FIXED = ("logits_index", "last_rows", "tokens")
_PARAMS = ("temperature", "repetition_penalty", "top_k", "top_p", "min_p")  # fp32 [slots] each


class DecodeState:
    """What a decode step reads and writes beside weights and KV cache, on the device, for up to ``slots`` slots."""

    def __init__(self, cuda: Cuda, slots: int, vocab_size: int, capacity: int):
        self._cuda, self._vocab_size, self._capacity = cuda, vocab_size, capacity
        sizes = dict.fromkeys((*_NOW, *_NEXT, *_FIXED), 8 * slots)
        sizes |= dict.fromkeys(_PARAMS, 4 * slots)
        sizes |= {"noise": 4 * slots * capacity, "seen": slots * vocab_size, "next_seen": slots * vocab_size}
        self._block = cuda.allocate(sum(map(aligned, sizes.values())))
        self._places, address = {}, self._block
        for name, size in sizes.items():
            self._places[name] = Region(address, size)
            address += aligned(size)
        self._tokens = [cuda.pinned(slots, np.int64) for _ in range(2)]

    def free(self) -> None:
        self._cuda.free(self._block)
        for array in self._tokens:
            self._cuda.free_pinned(array)

    def places(self) -> dict[str, Region]:
        """Where each of them lies, by the names of the decoder's and the samplers' tensors."""
        return self._places

    def feed(self, input_ids: np.ndarray, positions: np.ndarray) -> None:
        """The inputs of one decode step whose tokens the host chose, [B, 1] each."""
        self._put("input_ids", input_ids)
        self._put("positions", positions)
        self._put("logits_index", np.zeros(len(input_ids), np.int64))

    def start(self, slots: Sequence[Slot], sampled: bool) -> None:
        """The inputs of the first step of ``slots``, and all that the sampler has to know of each."""
        self.feed(
            np.array([slot.token for slot in slots], np.int64), np.array([slot.position for slot in slots], np.int64)
        )
        self._put("last_rows", np.full(len(slots), self._capacity - 1, np.int64))
        if not sampled:
            return
        self._put("steps", np.zeros(len(slots), np.int64))
        for name in _PARAMS:
            self._put(name, np.array([getattr(slot.params, name) for slot in slots], np.float32))
        noise = np.zeros((len(slots), self._capacity), np.float32)
        seen = np.zeros((len(slots), self._vocab_size), bool)
        for row, slot in enumerate(slots):
            drawn = slot.sampler.noise(min(slot.steps, self._capacity))
            noise[row, : len(drawn)] = drawn
            if slot.sampler.seen is not None:
                seen[row] = slot.sampler.seen
        self._put("noise", noise)
        self._put("seen", seen)

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

    def _put(self, name: str, array: np.ndarray) -> None:
        # CUDA has read pageable memory when the call returns, so the array may go.
        self._cuda.upload(self._places[name].address, np.ascontiguousarray(array))


class DecodeLoop:
    """Runs decode steps of a batch; a graph is captured for each context bucket and kind of sampler when it is first
    needed, and kept until ``forget``.

    ``decoder(batch, bucket)`` and ``sampler(batch, sampled)`` give contexts that are ready to run. ``captures``: without,
    each step is put on the stream anew.
    """

    def __init__(
        self,
        cuda: Cuda,
        decoder: Callable[[int, int], Context],
        sampler: Callable[[int, bool], Context],
        bucket: Callable[[int], int],
        captures: bool,
    ):
        self._cuda, self._decoder, self._sampler, self._bucket = cuda, decoder, sampler, bucket
        self._captures = captures
        self._graphs: dict[tuple[int, int, bool], tuple[object, tuple[Context, Context]]] = {}
        self._events = [cuda.event() for _ in range(2)]

    def uses(self, context: Context) -> bool:
        """Whether a graph was captured from ``context``, which then has to keep its shapes."""
        return any(context in contexts for _, contexts in self._graphs.values())

    def forget(self) -> None:
        """Drops the graphs: memory that they use has moved, or a context of theirs is to take other shapes."""
        if self._graphs:
            self._cuda.drop_graphs()
            self._graphs = {}

    def close(self) -> None:
        """Lets go of the contexts, once the session's CUDA has destroyed the graphs."""
        self._graphs = {}

    def run(self, state: DecodeState, slots: Sequence[Slot]) -> Iterator[np.ndarray]:
        """Yields the tokens, int64 [B], of each step, as many as the longest of ``slots`` has.

        Nothing of a token's way touches the host. It reads tokens one step behind, while the next step runs, so that
        what was computed past a stop is discarded when the generator is closed. −1: the logits were not numbers.
        """
        batch = len(slots)
        sampled = any(not slot.params.greedy or slot.params.repetition_penalty != 1 for slot in slots)
        state.start(slots, sampled)
        before = None
        for turn in range(max(slot.steps for slot in slots)):
            # A slot that has done its own steps idles: what it still writes and sees means nothing.
            last = max(slot.position + min(turn, slot.steps - 1) for slot in slots)
            self._step(state, batch, self._bucket(last + 1), sampled)
            tokens = state.fetch(turn, batch)
            self._cuda.record(self._events[turn % 2])
            if before is not None:
                self._cuda.wait(self._events[(turn - 1) % 2])
                yield before.copy()
            before = tokens
        if before is not None:
            self._cuda.synchronize()
            yield before.copy()

    def _step(self, state: DecodeState, batch: int, bucket: int, sampled: bool) -> None:
        key = batch, bucket, sampled
        if key in self._graphs:
            self._cuda.launch(self._graphs[key][0])
            return
        self._decoder(batch, bucket)
        sampler = self._sampler(batch, sampled)  # it may move the activations that the decoder was told of
        decoder = self._decoder(batch, bucket)

        def work() -> None:
            decoder.run()
            sampler.run()

        def step() -> None:
            work()
            state.advance(batch, sampled)

        if not self._captures:
            step()
            return
        work()  # TensorRT sets up what depends on shapes in a first run; without advance() it changes nothing
        self._graphs[key] = self._cuda.capture(step), (decoder, sampler)
        self._cuda.launch(self._graphs[key][0])
