"""The KV cache of a TensorRT session: one block of device memory, updated in place by every step."""

from math import prod
from typing import Any

from llmtrt.runtime.cuda import Cuda, Region

_ALIGNMENT = 256  # of device addresses, for TensorRT


def aligned(size: int) -> int:
    """``size`` rounded up to where the next tensor may start."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class KvCache:
    """Keys and values [slots, Hkv, capacity, D] of every layer, as ``engine``'s inputs past_* and outputs present_* of the
    same memory."""

    def __init__(self, engine: Any, cuda: Cuda):
        self._cuda = cuda
        self.slots = 0  # that there is memory for
        self._block = 0
        self._used = (0, 0)  # slots and rows of each that hold something
        self._tensors = []  # past_*, its shape without the batch, its bytes per slot
        self.aliased = True  # whether the plan itself updates every one in place
        for index in range(engine.num_io_tensors):
            past = engine.get_tensor_name(index)
            if past.startswith("past_"):
                self.aliased &= engine.get_aliased_input_tensor(_present(past)) == past
                shape = tuple(engine.get_tensor_shape(past))[1:]
                size = prod(shape) * engine.get_tensor_dtype(past).itemsize
                self._tensors.append((past, shape, size))

    def __len__(self) -> int:
        """The number of tensors: a key and a value for each layer."""
        return len(self._tensors)

    def capacities(self) -> set[int]:
        """The rows of the tensors, of which there should be one number."""
        return {shape[1] for _, shape, _ in self._tensors}

    @property
    def slots_are_aligned(self) -> bool:
        """Whether a tensor may begin at any slot."""
        return all(size % _ALIGNMENT == 0 for *_, size in self._tensors)

    def bytes_for(self, slots: int) -> int:
        return sum(aligned(slots * size) for *_, size in self._tensors)

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """The inputs' shapes for the first ``batch`` slots."""
        return {past: (batch, *shape) for past, shape, _ in self._tensors}

    def allocate(self, slots: int) -> None:
        """Takes memory for ``slots`` slots, in which nothing is set: ``zero`` it."""
        self._block = self._cuda.allocate(self.bytes_for(slots))
        self.slots = slots
        self.used(slots, max(self.capacities()))

    def free(self) -> None:
        self._cuda.free(self._block)
        self._block = self.slots = 0
        self._used = (0, 0)

    def places(self, first: int = 0) -> dict[str, Region]:
        """Where each input and output lies, of the slots from ``first`` on."""
        found, offset = {}, self._block
        for past, _, size in self._tensors:
            found[past] = found[_present(past)] = Region(offset + first * size, (self.slots - first) * size)
            offset += aligned(self.slots * size)
        return found

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Copies the first ``rows`` rows of slot ``source`` to slot ``target``."""
        offset = self._block
        for _, (heads, capacity, _), size in self._tensors:
            pitch = size // heads
            self._cuda.copy_2d(offset + target * size, offset + source * size, pitch // capacity * rows, pitch, heads)
            offset += aligned(self.slots * size)

    def clear_rows(self, slot: int, start: int) -> None:
        """Zeroes the rows of ``slot`` from ``start`` on that may have been written."""
        offset, rows = self._block, self._used[1] - start
        for _, (heads, capacity, _), size in self._tensors:
            pitch = size // heads
            row = pitch // capacity
            if rows > 0:
                self._cuda.zero(offset + slot * size + start * row, rows * row, pitch, heads)
            offset += aligned(self.slots * size)

    def used(self, slots: int, rows: int) -> None:
        """The first ``rows`` rows of the first ``slots`` slots may be written from now on."""
        self._used = max(slots, self._used[0]), max(rows, self._used[1])

    def zero(self) -> None:
        """Zeroes what may have been written: a row that nobody wrote has weight 0 in attention, and 0 times what lies there
        may be NaN."""
        (slots, rows), self._used = self._used, (0, 0)
        offset = self._block
        for _, (heads, capacity, _), size in self._tensors:
            pitch = size // heads
            if slots:
                self._cuda.zero(offset, pitch // capacity * rows, pitch, slots * heads)
            offset += aligned(self.slots * size)


def _present(past: str) -> str:
    return past.replace("past_", "present_", 1)
