"""INT4 projections written in standard operators: y [M, N] = x [M, K] · W, W in symmetric blocks of 128 along K.

Each form has a layout for the weights, which ``pack`` makes of q [K, N] (−8 … 7) and scale [K / block, N], and which
``write`` puts into a graph. Bytes are v = 16 · hi + lo + 8, so that hi = ⌊v / 16⌋ and lo = v − 16 · hi − 8.

Tried and dropped (benchmarks/gpu-projections-first.json; µs for a row of 4096 ↔ 14336 on an H100, where TensorRT's own form
takes 30): columns or rows of K innermost, and a package's own bytes (148 to 177, 276 with TensorRT's INT4 type, which it
takes apart a byte at a time); sums split along K (92); a scale that has to be unsqueezed (76: it loads one element at a
time); blocks of 32 (147); a byte for two rows (30); unpacking with the halves put together (181 for 16 rows, against 106).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import onnx_ir as ir

from llmtrt.graph.builder import GraphBuilder

BLOCK, HALF_BLOCK = 128, 64
HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
Arrays = dict[str, np.ndarray]  # by what each is: bytes, scale, …
Values = dict[str, ir.Value]


@dataclass(frozen=True)
class Form:
    """``rows``: the M that it is meant for. ``constant``: its weights lie in the plan, not in network inputs. ``block``: of
    K under one scale."""

    pack: Callable[[np.ndarray, np.ndarray], Arrays]
    write: Callable[[GraphBuilder, ir.Value, Values, int, int, int], ir.Value]
    rows: tuple[int, ...] = (1,)
    constant: bool = False
    block: int = BLOCK


def pack_spans(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """bytes [N, K / 128, 64]: byte j of a span has w[j] and w[j + 64]; scale [N, K / 128, 1], or of blocks of 64 two."""
    spans = q.T.reshape(q.shape[1], -1, 2, HALF_BLOCK).astype(np.int16)
    scales = scale.T.reshape(q.shape[1], spans.shape[1], -1)
    named = dict(zip(("scale", "scale_hi"), np.split(scales, scales.shape[2], 2)))
    found = {"bytes": (16 * spans[:, :, 1] + spans[:, :, 0] + 8).astype(np.int8)}
    return found | {name: np.ascontiguousarray(each) for name, each in named.items()}


def pack_int8(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """bytes [N, K], one weight each, and a scale for each row: another matrix, of the same size of numbers."""
    return {"bytes": np.ascontiguousarray(q.T), "scale": np.ascontiguousarray(scale[:1].T)}


def pack_native(q: np.ndarray, scale: np.ndarray) -> Arrays:
    return {"q": q, "scale": scale}


def _part(g: GraphBuilder, x: ir.Value, axis: int, index: int) -> ir.Value:
    return g.op("Gather", x, g.constant(index), axis=axis)


def _rows(g: GraphBuilder, x: ir.Value, m: int, one: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """``one`` of each row [K] of x [M, K], written out: [M, N]."""
    rows = [g.op("Unsqueeze", one(_part(g, x, 0, row)), g.constant([0])) for row in range(m)]
    return rows[0] if m == 1 else g.op("Concat", *rows, axis=0)


def _split(g: GraphBuilder, bytes: ir.Value) -> tuple[ir.Value, ir.Value]:
    """lo and hi of the bytes, fp16."""
    v = g.op("DequantizeLinear", bytes, g.constant(1, np.float16))
    hi = g.op("Floor", g.op("Mul", v, g.constant(1 / 16, np.float16)))
    lo = g.op("Sub", g.op("Sub", v, g.op("Mul", hi, g.constant(16, np.float16))), g.constant(8, np.float16))
    return lo, hi


def write_scale_last(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    """lo · x_a + hi · x_b in fp16, summed over the bytes of a block; blocks are scaled and summed in a second kernel."""
    lo, hi = _split(g, w["bytes"])
    scale = g.op("Reshape", w["scale"], g.constant([n, k // BLOCK]))

    def one(row: ir.Value) -> ir.Value:
        halves = g.op("Reshape", row, g.constant([k // BLOCK, 2, HALF_BLOCK]))
        p = g.op("Add", g.op("Mul", lo, _part(g, halves, 1, 0)), g.op("Mul", hi, _part(g, halves, 1, 1)))
        sums = g.op("Mul", g.op("ReduceSum", p, g.constant([2]), keepdims=0), scale)
        return g.op("ReduceSum", sums, g.constant([1]), keepdims=0)

    return _rows(g, x, m, one)


def write_two_scales(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    """lo · x_a and hi · x_b in fp16, each by its scale, in one kernel."""
    lo, hi = _split(g, w["bytes"])

    def one(row: ir.Value) -> ir.Value:
        halves = g.op("Reshape", row, g.constant([k // BLOCK, 2, HALF_BLOCK]))
        a = g.op("Mul", g.op("Mul", lo, _part(g, halves, 1, 0)), w["scale"])
        b = g.op("Mul", g.op("Mul", hi, _part(g, halves, 1, 1)), w["scale_hi"])
        return g.op("ReduceSum", g.op("Add", a, b), g.constant([1, 2]), keepdims=0)

    return _rows(g, x, m, one)


def _apart(g: GraphBuilder, x: ir.Value, mix: list[list[float]], dtype: ir.DataType) -> ir.Value:
    """Σ mix[i][j] · x[:, j] of x [b, 2, 64], in ``dtype`` [b, I, 64], as a kernel of its own: see
    llmtrt.graph.lowerings.weight_inputs."""
    factors = np.pad(np.array(mix, np.float32), ((0, 0), (0, 6)))[None, :, :, None]
    x = g.op("Concat", *[g.op("Unsqueeze", g.cast(x, HALF, dtype), g.constant([1]))] * 4, axis=2)
    return g.op("ReduceSum", g.op("Mul", x, g.constant(factors, dtype.numpy())), g.constant([2]), keepdims=0)


def _hi(g: GraphBuilder, t: ir.Value, dtype: ir.DataType, how: str) -> ir.Value:
    """hi of T = v / 16 = hi + (lo + 8) / 16. "floor", or "added": by adding what leaves no bits for a fraction."""
    if how == "floor":
        return g.op("Floor", t)
    huge = g.constant(1.5 * 2 ** (23 if dtype == FLOAT else 10), dtype.numpy())
    near = g.op("Sub", t, g.constant(15 / 32, dtype.numpy()))
    return g.op("Sub", g.op("Add", near, huge), huge)


def write_spans(parts: int, dtype: ir.DataType = FLOAT, how: str = "floor", offset: bool = True) -> Callable:
    """T = v / 16, hi = ⌊T⌋, and Σ s · (T · 16 x_a + hi · (x_b − 16 x_a) − 8 x_a) in fp32, which loses nothing where the two
    cancel. ``dtype`` of T and hi, which hold few bits; ``parts`` of a block are summed before the reduction; without
    ``offset``, T less a half instead of the 8 x_a. With two scales: (T − hi) · 16 x_a − 8 x_a, and hi · x_b."""

    def write(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
        width, apart = HALF_BLOCK // parts, "scale_hi" in w
        bytes = g.op("Reshape", w["bytes"], g.constant([n, k // BLOCK, parts, width]))
        lows, highs, single = [], [], partial(g.cast, source=dtype, target=FLOAT)
        for part in range(parts):
            t = g.op("DequantizeLinear", _part(g, bytes, 2, part), g.constant(1 / 16, dtype.numpy()))
            hi = _hi(g, t, dtype, how)
            low = g.op("Sub", t, hi) if apart else t
            low = low if offset else g.op("Sub", low, g.constant(0.5, dtype.numpy()))
            lows.append(single(low))
            highs.append(single(hi))
        mix = [[16, 0], [0 if apart else -16, 1]] + ([[-8, 0]] if offset else [])

        def one(row: ir.Value) -> ir.Value:
            halves = g.op("Reshape", row, g.constant([k // BLOCK, 2, HALF_BLOCK]))
            factors = g.op("Reshape", _apart(g, halves, mix, FLOAT), g.constant([k // BLOCK, len(mix), parts, width]))
            sums = {"scale": [], "scale_hi": []}
            for part, (low, high) in enumerate(zip(lows, highs)):
                a, b, *c = (_part(g, _part(g, factors, 1, index), 1, part) for index in range(len(mix)))
                low = g.op("Mul", low, a)
                sums["scale"].append(g.op("Add", low, c[0]) if offset else low)
                sums["scale_hi" if apart else "scale"].append(g.op("Mul", high, b))
            add = partial(g.op, "Add")
            scaled = [
                g.op("Mul", reduce(add, each), g.cast(w[name], HALF, FLOAT)) for name, each in sums.items() if each
            ]
            return g.cast(g.op("ReduceSum", reduce(add, scaled), g.constant([1, 2]), keepdims=0), FLOAT, HALF)

        return _rows(g, x, m, one)

    return write


def write_spans_half(parts: int) -> Callable:
    """In fp16 up to the reduction, so that factors take half as much of the L1 cache; with lo / 16 = T − hi − 1/2 itself, as
    the difference of large products would lose bits."""

    def write(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
        width = HALF_BLOCK // parts
        bytes, numbers = g.op("Reshape", w["bytes"], g.constant([n, k // BLOCK, parts, width])), []
        for part in range(parts):
            t = g.op("DequantizeLinear", _part(g, bytes, 2, part), g.constant(1 / 16, np.float16))
            hi = g.op("Floor", t)
            numbers.append((g.op("Sub", g.op("Sub", t, hi), g.constant(0.5, np.float16)), hi))

        def one(row: ir.Value) -> ir.Value:
            halves = g.op("Reshape", row, g.constant([k // BLOCK, 2, HALF_BLOCK]))
            factors = _apart(g, halves, [[16, 0], [0, 1]], HALF)
            factors = g.op("Reshape", factors, g.constant([k // BLOCK, 2, parts, width]))
            sums = [
                g.op("Mul", each, _part(g, _part(g, factors, 1, index), 1, part))
                for part, pair in enumerate(numbers)
                for index, each in enumerate(pair)
            ]
            p = g.op("Mul", reduce(partial(g.op, "Add"), sums), w["scale"])
            return g.op("ReduceSum", p, g.constant([1, 2]), keepdims=0)

        return _rows(g, x, m, one)

    return write


def write_unpacked(dtype: ir.DataType) -> Callable:
    """lo and hi each a matrix [N, K / 2] for its own half of x, for many rows. ``dtype``: of the products as written."""

    def write(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
        halves, sums = g.op("Reshape", x, g.constant([m, k // BLOCK, 2, HALF_BLOCK])), []
        for index, part in enumerate(_split(g, w["bytes"])):
            half = g.op("Reshape", _part(g, halves, 2, index), g.constant([m, k // 2]))
            matrix = g.op("Reshape", g.op("Mul", part, w["scale"]), g.constant([n, k // 2]))
            sums.append(g.op("Gemm", g.cast(half, HALF, dtype), g.cast(matrix, HALF, dtype), transB=1))
        return g.cast(g.op("Add", *sums), dtype, HALF)

    return write


def write_int8(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    v = g.op("DequantizeLinear", w["bytes"], g.constant(1, np.float16))

    def one(row: ir.Value) -> ir.Value:
        sums = g.op("ReduceSum", g.op("Mul", v, row), g.constant([1]))
        return g.op("Squeeze", g.op("Mul", sums, w["scale"]), g.constant([1]))

    return _rows(g, x, m, one)


def write_native(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    return g.op("MatMul", x, g.op("DequantizeLinear", w["q"], w["scale"], axis=0, block_size=BLOCK))


FEW, SOME, MANY = (1, 2, 4), (1, 2, 4, 8, 16), (16, 64, 512, 2048)
FORMS = {
    "native": Form(pack_native, write_native, (1, 2, 4, 8, *MANY), constant=True),
    "native, weights as inputs": Form(pack_native, write_native, (1, 2, *MANY)),
    "scale last": Form(pack_spans, write_scale_last, FEW),
    "two scales, blocks of 64": Form(pack_spans, write_two_scales, FEW, block=64),
    **{
        f"{parts} parts, {name}": Form(pack_spans, write_spans(parts, *how), SOME if parts == 2 else (1, 2))
        for parts in (1, 2, 4)
        for name, how in {
            "half": (HALF,),
            "float": (FLOAT,),
            "float, added": (FLOAT, "added"),
            "float, no offset": (FLOAT, "floor", False),
        }.items()
    },
    **{f"{parts} parts, all half": Form(pack_spans, write_spans_half(parts), SOME) for parts in (1, 2, 4)},
    "2 parts, float, blocks of 64": Form(pack_spans, write_spans(2), FEW, block=64),
    "unpacked": Form(pack_spans, write_unpacked(HALF), (2, *MANY)),
    "unpacked, in fp32": Form(pack_spans, write_unpacked(FLOAT), (16, 512)),
    "int8": Form(pack_int8, write_int8, FEW),
}
