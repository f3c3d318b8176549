"""Which form each matrix takes where an average number of bits is to be spent on all."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """INT4 in blocks of ``block`` along K, or INT8 with one scale an output (``block`` 0)."""

    block: int

    def bits(self, k: int) -> float:
        """Bits a weight of a matrix [N, ``k``], its 16-bit scales included."""
        return 4 + 16 / self.block if self.block else 8 + 16 / k


INT8 = Form(0)
_BLOCKS = (128, 64, 32, 16)


def candidates(k: int) -> list[Form]:
    """The forms that a matrix [N, ``k``] can take; none where no block divides k."""
    blocks = [Form(block) for block in _BLOCKS if k % block == 0]
    return [*blocks, INT8] if blocks else []


def choose_forms(
    losses: Mapping[str, Mapping[Form, float]], shapes: Mapping[str, tuple[int, int]], bits: float
) -> dict[str, Form]:
    """A form for each matrix, of those that ``losses`` knows, with about the least sum of losses at ``bits`` bits a weight
    on average or less: from the smallest forms on, the step that saves most a bit, as long as it fits.

    ``shapes``: [N, K]. The smallest forms are taken whatever ``bits`` says.
    """
    ladders = {name: _ladder(options, shapes[name][1]) for name, options in losses.items()}
    sizes = {name: shapes[name][0] * shapes[name][1] for name in losses}
    room = bits * sum(sizes.values()) - sum(sizes[name] * ladder[0][0] for name, ladder in ladders.items())
    chosen = dict.fromkeys(ladders, 0)
    steps = [step for name in ladders if (step := _step(ladders[name], sizes[name], 0, name))]
    heapq.heapify(steps)
    while steps:
        _, cost, name = heapq.heappop(steps)
        if cost > room:
            continue  # and neither do its later steps; a smaller matrix may still fit
        room -= cost
        chosen[name] += 1
        if step := _step(ladders[name], sizes[name], chosen[name], name):
            heapq.heappush(steps, step)
    return {name: ladders[name][place][2] for name, place in chosen.items()}


def _ladder(options: Mapping[Form, float], k: int) -> list[tuple[float, float, Form]]:
    """(bits, loss, form) from the smallest on, those alone on the lower convex hull: each step saves less a bit than the one
    before."""
    hull: list[tuple[float, float, Form]] = []
    for point in sorted(((form.bits(k), loss, form) for form, loss in options.items()), key=lambda point: point[:2]):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: tuple, other: tuple) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def _step(ladder: list, size: int, place: int, name: str) -> tuple[float, float, str] | None:
    """(−saving a bit, bits, name) of the step up from ``place``."""
    if place + 1 == len(ladder):
        return None
    cost = size * (ladder[place + 1][0] - ladder[place][0])
    return (ladder[place + 1][1] - ladder[place][1]) / cost, cost, name
