"""The KV cache of a TensorRT session: one block of device memory, updated in place by every step."""

from collections.abc import Iterator
from math import prod

from llmtrt.graph.names import PAST_VALUE, VALUE_ROWS
from llmtrt.runtime.cuda import Cuda, Region
from llmtrt.runtime.tensors import Tensor

_ALIGNMENT = 256  # of device addresses, for TensorRT


def aligned(size: int) -> int:
    """``size`` rounded up to where the next tensor may start."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class KvCache:
    """Keys and values of every layer, [slots, Hkv, capacity, D] or [slots, 1, capacity, Hkv · D], as a plan's inputs past_*
    and outputs present_*, which are among its ``tensors``, of the same memory."""

    def __init__(self, tensors: tuple[Tensor, ...], cuda: Cuda):
        self._cuda = cuda
        self.slots = 0  # that there is memory for
        self._block = 0
        self._used = (0, 0)  # slots and rows of each that hold something
        # past_*, its shape without the batch, its bytes per slot
        self._tensors = [
            (each.name, each.shape[1:], prod(each.shape[1:]) * each.itemsize)
            for each in tensors
            if each.name.startswith("past_")
        ]
        aliases = {each.name: each.alias for each in tensors}
        # whether the plan itself updates every one in place
        self.aliased = all(aliases.get(_present(past)) == past for past, *_ in self._tensors)

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
        """Where each input and output lies, of the slots from ``first`` on, and what an input is the beginning of."""
        found = {}
        for address, (past, _, size) in self._lying():
            place = Region(address + first * size, (self.slots - first) * size)
            found[past] = found[_present(past)] = found[past.replace(PAST_VALUE, VALUE_ROWS, 1)] = place
        return found

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Copies the first ``rows`` rows of slot ``source`` to slot ``target``."""
        for address, (_, (heads, capacity, _), size) in self._lying():
            pitch = size // heads
            self._cuda.copy_2d(address + target * size, address + source * size, pitch // capacity * rows, pitch, heads)

    def clear_rows(self, slot: int, start: int) -> None:
        """Zeroes the rows of ``slot`` from ``start`` on that may have been written."""
        self._zero(slot, 1, start, self._used[1])

    def used(self, slots: int, rows: int) -> None:
        """The first ``rows`` rows of the first ``slots`` slots may be written from now on."""
        self._used = max(slots, self._used[0]), max(rows, self._used[1])

    def zero(self) -> None:
        """Zeroes what may have been written: a row that nobody wrote has weight 0 in attention, and 0 times what lies there
        may be NaN."""
        (slots, rows), self._used = self._used, (0, 0)
        self._zero(0, slots, 0, rows)

    def _zero(self, first: int, slots: int, start: int, end: int) -> None:
        """Zeroes the rows from ``start`` to ``end`` of ``slots`` slots from ``first`` on."""
        if not slots or start >= end:
            return
        for address, (_, (heads, capacity, _), size) in self._lying():
            pitch = size // heads
            row = pitch // capacity
            self._cuda.zero(address + first * size + start * row, (end - start) * row, pitch, slots * heads)

    def _lying(self) -> Iterator[tuple[int, tuple[str, tuple[int, ...], int]]]:
        """The address of each tensor, and what is known of it."""
        address = self._block
        for tensor in self._tensors:
            yield address, tensor
            address += aligned(self.slots * tensor[2])


def _present(past: str) -> str:
    return past.replace("past_", "present_", 1)
