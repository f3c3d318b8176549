"""INT4 projections written in standard operators: y [M, N] = x [M, K] · W, W in symmetric blocks of 128 along K.

Each form has a layout for the weights, which ``pack`` makes of q [K, N] (−8 … 7) and scale [K / 128, N], and which ``write``
puts into a graph. Bytes are v = 16 · hi + lo + 8, so that hi = ⌊v / 16⌋ and lo = v − 16 · hi − 8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import onnx_ir as ir

from llmtrt.graph.builder import GraphBuilder

BLOCK = 128
HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
Arrays = dict[str, np.ndarray]  # by what each is: bytes, scale, …
Values = dict[str, ir.Value]


@dataclass(frozen=True)
class Form:
    """``rows``: the M that it is meant for. ``constant``: its weights lie in the plan, not in network inputs. ``block``: of
    K under one scale. ``rounds``: it needs each sum rounded to fp16, where ONNX Runtime keeps fp32."""

    pack: Callable[[np.ndarray, np.ndarray], Arrays]
    write: Callable[[GraphBuilder, ir.Value, Values, int, int, int], ir.Value]
    rows: tuple[int, ...] = (1,)
    constant: bool = False
    block: int = BLOCK
    rounds: bool = False


def nibbles(lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    return (16 * hi.astype(np.int16) + lo + 8).astype(np.int8)


def pack_blocks(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """bytes [N, K / 128, 64]: byte j of a block has w[j] and w[j + 64]; scale [N, K / 128]."""
    blocks = q.T.reshape(q.shape[1], -1, 2, BLOCK // 2)
    return {"bytes": nibbles(blocks[:, :, 0], blocks[:, :, 1]), "scale": np.ascontiguousarray(scale.T)}


def pack_pairs(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """bytes [N, K / 2 / block, block]: byte j has w[j] of one block and of the next; a scale of each."""
    blocks = q.T.reshape(q.shape[1], -1, 2, len(q) // len(scale))
    scales = scale.T.reshape(q.shape[1], -1, 2)
    return {
        "bytes": nibbles(blocks[:, :, 0], blocks[:, :, 1]),
        "scale": np.ascontiguousarray(scales[..., :1]),
        "scale_hi": np.ascontiguousarray(scales[..., 1:]),
    }


def pack_row_halves(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """bytes [N / 2, K / 128, 128]: a byte has a weight of row n and of row n + N / 2; a scale [N / 2, K / 128] of each."""
    lo, hi = (half.T.reshape(q.shape[1] // 2, -1, BLOCK) for half in np.split(q, 2, 1))
    scales = [np.ascontiguousarray(half.T) for half in np.split(scale, 2, 1)]
    return {"bytes": nibbles(lo, hi), "scale": scales[0], "scale_hi": scales[1]}


def pack_unsigned(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """As ``pack_blocks``, both weights with 8 added, in a byte without a sign."""
    blocks = pack_blocks(q, scale)
    return blocks | {"bytes": (blocks["bytes"].astype(np.int16) + 128).astype(np.uint8)}


def pack_columns(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """bytes [K, N / 2]: two columns a byte; scale [K / 128, N]."""
    return {"bytes": nibbles(q[:, ::2], q[:, 1::2]), "scale": scale}


def pack_package(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """bytes [K, N / 2] as they lie in a package's file: lo and hi in two's complement."""
    return {"bytes": (q[:, ::2] & 15 | q[:, 1::2] << 4).astype(np.int8), "scale": scale}


def pack_rows(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """bytes [K / 128, 64, N], the columns innermost; scale [K / 128, N]."""
    blocks = q.reshape(-1, 2, BLOCK // 2, q.shape[1])
    return {"bytes": nibbles(blocks[:, 0], blocks[:, 1]), "scale": scale}


def pack_int8(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """bytes [N, K], one weight each, and a scale for each row: another matrix, of the same size of numbers."""
    return {"bytes": np.ascontiguousarray(q.T), "scale": np.ascontiguousarray(scale[:1].T)}


def pack_native(q: np.ndarray, scale: np.ndarray) -> Arrays:
    return {"q": q, "scale": scale}


def pack_native_rows(q: np.ndarray, scale: np.ndarray) -> Arrays:
    return {"q": np.ascontiguousarray(q.T), "scale": np.ascontiguousarray(scale.T)}


def _split(g: GraphBuilder, w: Values) -> tuple[ir.Value, ir.Value]:
    """lo and hi of the bytes, fp16."""
    v = g.op("DequantizeLinear", w["bytes"], g.constant(1, np.float16))
    hi = g.op("Floor", g.op("Mul", v, g.constant(1 / 16, np.float16)))
    lo = g.op("Sub", g.op("Sub", v, g.op("Mul", hi, g.constant(16, np.float16))), g.constant(8, np.float16))
    return lo, hi


def _split_added(g: GraphBuilder, w: Values) -> tuple[ir.Value, ir.Value]:
    """As ``_split``, but hi rounded by adding and taking away 1536, past which fp16 has integers alone."""
    v = g.op("DequantizeLinear", w["bytes"], g.constant(1, np.float16))
    near = g.op("Add", g.op("Mul", v, g.constant(1 / 16, np.float16)), g.constant(-15 / 32, np.float16))
    hi = g.op("Sub", g.op("Add", near, g.constant(1536, np.float16)), g.constant(1536, np.float16))
    lo = g.op("Sub", g.op("Sub", v, g.op("Mul", hi, g.constant(16, np.float16))), g.constant(8, np.float16))
    return lo, hi


def _split_unsigned(g: GraphBuilder, w: Values) -> tuple[ir.Value, ir.Value]:
    v, eight = g.op("Cast", w["bytes"], to=int(HALF)), g.constant(8, np.float16)
    hi = g.op("Floor", g.op("Mul", v, g.constant(1 / 16, np.float16)))
    lo = g.op("Sub", v, g.op("Mul", hi, g.constant(16, np.float16)))
    return g.op("Sub", lo, eight), g.op("Sub", hi, eight)


def _split_package(g: GraphBuilder, w: Values) -> tuple[ir.Value, ir.Value]:
    """lo and hi of bytes that hold two numbers of four bits in two's complement, as ONNX packs INT4."""
    v = g.op("DequantizeLinear", w["bytes"], g.constant(1, np.float16))
    hi = g.op("Floor", g.op("Mul", v, g.constant(1 / 16, np.float16)))
    lo = g.op("Sub", v, g.op("Mul", hi, g.constant(16, np.float16)))
    above = g.op("Floor", g.op("Mul", lo, g.constant(1 / 8, np.float16)))
    return g.op("Sub", lo, g.op("Mul", above, g.constant(16, np.float16))), hi


def _part(g: GraphBuilder, x: ir.Value, axis: int, index: int) -> ir.Value:
    return g.op("Gather", x, g.constant(index), axis=axis)


def _rows(g: GraphBuilder, x: ir.Value, m: int, one: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """``one`` of each row [K] of x [M, K], written out: [M, N]."""
    rows = [g.op("Unsqueeze", one(_part(g, x, 0, row)), g.constant([0])) for row in range(m)]
    return rows[0] if m == 1 else g.op("Concat", *rows, axis=0)


def write_blocks(scale_first: bool, split: int = 1, halves_of: Callable = _split) -> Callable:
    """lo · x_a + hi · x_b, summed over blocks and bytes; ``split``: along K in so many parts, added at the end."""

    def write(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
        lo, hi = halves_of(g, w)

        def one(row: ir.Value) -> ir.Value:
            halves = g.op("Reshape", row, g.constant([k // BLOCK, 2, BLOCK // 2]))
            p = g.op("Add", g.op("Mul", lo, _part(g, halves, 1, 0)), g.op("Mul", hi, _part(g, halves, 1, 1)))
            if scale_first:
                p = g.op("Mul", p, g.op("Unsqueeze", w["scale"], g.constant([2])))
                if split == 1:
                    return g.op("ReduceSum", p, g.constant([1, 2]), keepdims=0)
                p = g.op("Reshape", p, g.constant([n, split, k // BLOCK // split, BLOCK // 2]))
                return g.op(
                    "ReduceSum", g.op("ReduceSum", p, g.constant([2, 3]), keepdims=0), g.constant([1]), keepdims=0
                )
            sums = g.op("ReduceSum", p, g.constant([2]), keepdims=0)
            return g.op("ReduceSum", g.op("Mul", sums, w["scale"]), g.constant([1]), keepdims=0)

        return _rows(g, x, m, one)

    return write


def write_whole(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    """The byte as it is: v · x_a + hi · (x_b − 16 · x_a), less 8 · x_a, which is the same for all columns."""
    v = g.op("DequantizeLinear", w["bytes"], g.constant(1, np.float16))
    hi = g.op("Floor", g.op("Mul", v, g.constant(1 / 16, np.float16)))
    single = ir.DataType.FLOAT

    def one(row: ir.Value) -> ir.Value:
        halves = g.op("Reshape", row, g.constant([k // BLOCK, 2, BLOCK // 2]))
        a, b = _part(g, halves, 1, 0), _part(g, halves, 1, 1)
        other = g.op("Sub", b, g.op("Mul", a, g.constant(16, np.float16)))
        offset = g.op("ReduceSum", g.op("Mul", a, g.constant(8, np.float16)), g.constant([1]), keepdims=0)
        p = g.op("Add", g.op("Mul", v, a), g.op("Mul", hi, other))
        sums = g.op("ReduceSum", g.cast(p, HALF, single), g.constant([2]), keepdims=0)
        sums = g.op("Sub", sums, g.cast(offset, HALF, single))
        sums = g.op("ReduceSum", g.op("Mul", sums, g.cast(w["scale"], HALF, single)), g.constant([1]), keepdims=0)
        return g.cast(sums, single, HALF)

    return _rows(g, x, m, one)


def _apart(g: GraphBuilder, x: ir.Value, mix: np.ndarray, dtype: ir.DataType) -> ir.Value:
    """Σ mix[i, j] · x[…, j, …] over the second axis of x [b, J, L], in ``dtype`` [b, I, L], as a kernel of its own.

    What computes x would otherwise be computed again for every row of a matrix that it is multiplied with: TensorRT fuses
    everything into a reduction but another reduction, unless that is over fewer than 8.
    """
    copies = -(-8 // mix.shape[1])
    factors = np.concatenate([mix] + [np.zeros_like(mix)] * (copies - 1), 1)[None, :, :, None]
    x = g.op("Concat", *[g.op("Unsqueeze", g.cast(x, HALF, dtype), g.constant([1]))] * copies, axis=2)
    return g.op("ReduceSum", g.op("Mul", x, g.constant(factors, dtype.numpy())), g.constant([2]), keepdims=0)


def pack_spans(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """As ``pack_blocks``, the scale [N, K / 128, 1]: an Unsqueeze of it keeps TensorRT from loading vectors."""
    blocks = pack_blocks(q, scale)
    return blocks | {"scale": blocks["scale"][..., None]}


def _integer(g: GraphBuilder, t: ir.Value, dtype: ir.DataType, how: str) -> ir.Value:
    """hi of T = v / 16 = hi + (lo + 8) / 16. "floor", or "added": by adding what leaves no bits for a fraction."""
    if how == "floor":
        return g.op("Floor", t)
    huge = g.constant(1.5 * 2 ** (23 if dtype == FLOAT else 10), dtype.numpy())
    near = g.op("Sub", t, g.constant(15 / 32, dtype.numpy()))
    return g.op("Sub", g.op("Add", near, huge), huge)


def write_spans(parts: int, dtype: ir.DataType, how: str = "floor", offset: bool = True) -> Callable:
    """T = v / 16, hi = ⌊T⌋, and Σ s · (T · 16 x_a + hi · (x_b − 16 x_a) − 8 x_a) in fp32, which loses nothing where the two
    cancel. ``dtype`` of T and hi, which hold few bits; ``parts`` of a block are summed before the reduction; without
    ``offset``, T less a half instead of the 8 x_a."""
    mix = np.array([[16, 0], [-16, 1], [-8, 0]], np.float32)[: 3 if offset else 2]

    def write(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
        t = g.op("DequantizeLinear", w["bytes"], g.constant(1 / 16, dtype.numpy()))
        hi = _integer(g, t, dtype, how)
        if not offset:
            t = g.op("Sub", t, g.constant(0.5, dtype.numpy()))
        width = BLOCK // 2 // parts
        t, hi = (g.op("Reshape", each, g.constant([n, k // BLOCK, parts, width])) for each in (t, hi))

        def one(row: ir.Value) -> ir.Value:
            halves = g.op("Reshape", row, g.constant([k // BLOCK, 2, BLOCK // 2]))
            factors = g.op("Reshape", _apart(g, halves, mix, FLOAT), g.constant([k // BLOCK, len(mix), parts, width]))
            sums = []
            for part in range(parts):
                p, *least = (_part(g, _part(g, factors, 1, index), 1, part) for index in reversed(range(len(mix))))
                a, b = (least[1], least[0]) if offset else (least[0], p)
                terms = [(t, a), (hi, b)]
                if not offset:
                    p = g.op("Mul", g.cast(_part(g, hi, 2, part), dtype, FLOAT), b)
                    terms = terms[:1]
                for each, factor in terms:
                    p = g.op("Add", g.op("Mul", g.cast(_part(g, each, 2, part), dtype, FLOAT), factor), p)
                sums.append(p)
            p = g.op("Mul", reduce(partial(g.op, "Add"), sums), g.cast(w["scale"], HALF, FLOAT))
            return g.cast(g.op("ReduceSum", p, g.constant([1, 2]), keepdims=0), FLOAT, HALF)

        return _rows(g, x, m, one)

    return write


def write_spans_half(parts: int) -> Callable:
    """In fp16 up to the reduction, so that factors take half as much of the L1 cache; with lo / 16 = T − hi − 1/2 itself, as
    the difference of large products would lose bits."""

    def write(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
        t = g.op("DequantizeLinear", w["bytes"], g.constant(1 / 16, np.float16))
        hi = g.op("Floor", t)
        lo = g.op("Sub", g.op("Sub", t, hi), g.constant(0.5, np.float16))
        width = BLOCK // 2 // parts
        lo, hi = (g.op("Reshape", each, g.constant([n, k // BLOCK, parts, width])) for each in (lo, hi))

        def one(row: ir.Value) -> ir.Value:
            halves = g.op("Reshape", row, g.constant([k // BLOCK, 2, BLOCK // 2]))
            mix = np.array([[16, 0], [0, 1]], np.float32)
            factors = g.op("Reshape", _apart(g, halves, mix, HALF), g.constant([k // BLOCK, 2, parts, width]))
            sums = [
                g.op("Mul", _part(g, each, 2, part), _part(g, _part(g, factors, 1, index), 1, part))
                for part in range(parts)
                for index, each in enumerate((lo, hi))
            ]
            p = g.op("Mul", reduce(partial(g.op, "Add"), sums), w["scale"])
            return g.op("ReduceSum", p, g.constant([1, 2]), keepdims=0)

        return _rows(g, x, m, one)

    return write


def write_together(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    """All rows in one product [M, N, K / 128, 64]."""
    lo, hi = _split(g, w)
    halves = g.op("Reshape", x, g.constant([m, 1, k // BLOCK, 2, BLOCK // 2]))
    p = g.op("Add", g.op("Mul", lo, _part(g, halves, 3, 0)), g.op("Mul", hi, _part(g, halves, 3, 1)))
    p = g.op("Mul", p, g.op("Unsqueeze", w["scale"], g.constant([2])))
    return g.op("ReduceSum", p, g.constant([2, 3]), keepdims=0)


def write_pairs(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    lo, hi = _split(g, w)
    pairs, block = w["bytes"].shape[1:]

    def one(row: ir.Value) -> ir.Value:
        halves = g.op("Reshape", row, g.constant([pairs, 2, block]))
        a = g.op("Mul", g.op("Mul", lo, _part(g, halves, 1, 0)), w["scale"])
        b = g.op("Mul", g.op("Mul", hi, _part(g, halves, 1, 1)), w["scale_hi"])
        return g.op("ReduceSum", g.op("Add", a, b), g.constant([1, 2]), keepdims=0)

    return _rows(g, x, m, one)


def write_columns(scale_first: bool, split: Callable = _split) -> Callable:
    """Sums over K of columns that lie side by side; the two of a byte are parted at the end."""

    def write(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
        scales = g.op("Reshape", w["scale"], g.constant([k // BLOCK, n // 2, 2]))

        def one(row: ir.Value) -> ir.Value:
            column, sums = g.op("Reshape", row, g.constant([k, 1])), []
            for part, values in enumerate(split(g, w)):
                p = g.op("Reshape", g.op("Mul", values, column), g.constant([k // BLOCK, BLOCK, n // 2]))
                scale = _part(g, scales, 2, part)
                if scale_first:
                    p = g.op("Mul", p, g.op("Unsqueeze", scale, g.constant([1])))
                    sums.append(g.op("ReduceSum", p, g.constant([0, 1]), keepdims=0))
                else:
                    p = g.op("Mul", g.op("ReduceSum", p, g.constant([1]), keepdims=0), scale)
                    sums.append(g.op("ReduceSum", p, g.constant([0]), keepdims=0))
            pairs = [g.op("Unsqueeze", each, g.constant([1])) for each in sums]
            return g.op("Reshape", g.op("Concat", *pairs, axis=1), g.constant([n]))

        return _rows(g, x, m, one)

    return write


def write_package(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    """A package's own bytes unpacked into a matrix [K, N], for many rows."""
    lo, hi = _split_package(g, w)
    values = g.op("Concat", *(g.op("Unsqueeze", each, g.constant([2])) for each in (lo, hi)), axis=2)
    values = g.op("Reshape", values, g.constant([k // BLOCK, BLOCK, n]))
    matrix = g.op("Mul", values, g.op("Unsqueeze", w["scale"], g.constant([1])))
    return g.op("MatMul", x, g.op("Reshape", matrix, g.constant([k, n])))


def write_rows(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    lo, hi = _split(g, w)

    def one(row: ir.Value) -> ir.Value:
        halves = g.op("Reshape", row, g.constant([k // BLOCK, 2, BLOCK // 2, 1]))
        p = g.op("Add", g.op("Mul", lo, _part(g, halves, 1, 0)), g.op("Mul", hi, _part(g, halves, 1, 1)))
        sums = g.op("Mul", g.op("ReduceSum", p, g.constant([1]), keepdims=0), w["scale"])
        return g.op("ReduceSum", sums, g.constant([0]), keepdims=0)

    return _rows(g, x, m, one)


def write_int8(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    v = g.op("DequantizeLinear", w["bytes"], g.constant(1, np.float16))
    return _rows(
        g,
        x,
        m,
        lambda row: g.op(
            "Squeeze",
            g.op("Mul", g.op("ReduceSum", g.op("Mul", v, row), g.constant([1])), w["scale"]),
            g.constant([1]),
        ),
    )


def write_unpacked(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    """The same bytes as ``write_blocks`` unpacked into a matrix, for many rows."""
    values = g.op("Concat", *_split(g, w), axis=2)
    matrix = g.op("Mul", values, g.op("Unsqueeze", w["scale"], g.constant([2])))
    return g.op("MatMul", x, g.op("Transpose", g.op("Reshape", matrix, g.constant([n, k])), perm=[1, 0]))


def write_unpacked_in_parts(parts: int) -> Callable:
    """The same, a part of the columns at a time: what is unpacked of each may stay in the L2 cache."""

    def write(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
        sums, step = [], n // parts
        for start in range(0, n, step):
            bounds = (g.constant([start]), g.constant([start + step]), g.constant([0]))
            part = {name: g.op("Slice", value, *bounds) for name, value in w.items()}
            sums.append(write_unpacked(g, x, part, m, k, step))
        return g.op("Concat", *sums, axis=1)

    return write


def write_unpacked_left(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    """The same as the left factor: (W xᵀ)ᵀ, so that only what is small is transposed."""
    values = g.op("Concat", *_split(g, w), axis=2)
    matrix = g.op("Reshape", g.op("Mul", values, g.op("Unsqueeze", w["scale"], g.constant([2]))), g.constant([n, k]))
    return g.op("Transpose", g.op("MatMul", matrix, g.op("Transpose", x, perm=[1, 0])), perm=[1, 0])


def write_unpacked_gemm(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    values = g.op("Concat", *_split(g, w), axis=2)
    matrix = g.op("Reshape", g.op("Mul", values, g.op("Unsqueeze", w["scale"], g.constant([2]))), g.constant([n, k]))
    return g.op("Gemm", x, matrix, transB=1)


def write_unpacked_halves(left: bool) -> Callable:
    """lo and hi each a matrix [N, K / 2] for its own half of x, so that nothing is put together. ``left``: as the left
    factor."""

    def write(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
        halves = g.op("Reshape", x, g.constant([m, k // BLOCK, 2, BLOCK // 2]))
        scale, sums = g.op("Unsqueeze", w["scale"], g.constant([2])), []
        for index, part in enumerate(_split(g, w)):
            half = g.op("Reshape", _part(g, halves, 2, index), g.constant([m, k // 2]))
            matrix = g.op("Reshape", g.op("Mul", part, scale), g.constant([n, k // 2]))
            if left:
                sums.append(g.op("MatMul", matrix, g.op("Transpose", half, perm=[1, 0])))
            else:
                sums.append(g.op("Gemm", half, matrix, transB=1))
        y = g.op("Add", *sums)
        return g.op("Transpose", y, perm=[1, 0]) if left else y

    return write


def write_row_halves(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    parts = list(zip(_split(g, w), (w["scale"], w["scale_hi"])))

    def one(row: ir.Value) -> ir.Value:
        blocks, sums = g.op("Reshape", row, g.constant([k // BLOCK, BLOCK])), []
        for part, scale in parts:
            p = g.op("ReduceSum", g.op("Mul", part, blocks), g.constant([2]), keepdims=0)
            sums.append(g.op("ReduceSum", g.op("Mul", p, scale), g.constant([1]), keepdims=0))
        return g.op("Concat", *sums, axis=0)

    return _rows(g, x, m, one)


def write_row_halves_unpacked(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    sums = []
    for part, scale in zip(_split(g, w), (w["scale"], w["scale_hi"])):
        matrix = g.op("Mul", part, g.op("Unsqueeze", scale, g.constant([2])))
        sums.append(g.op("Gemm", x, g.op("Reshape", matrix, g.constant([n // 2, k])), transB=1))
    return g.op("Concat", *sums, axis=1)


def write_shared_pairs(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    """``write_pairs`` on the bytes of ``pack_blocks``: both halves of a block have its scale."""
    scale = g.op("Unsqueeze", w["scale"], g.constant([2]))
    return write_pairs(g, x, {"bytes": w["bytes"], "scale": scale, "scale_hi": scale}, m, k, n)


def write_native(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    return g.op("MatMul", x, g.op("DequantizeLinear", w["q"], w["scale"], axis=0, block_size=BLOCK))


def write_native_sum(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    matrix = g.op("DequantizeLinear", w["q"], w["scale"], axis=1, block_size=BLOCK)
    return _rows(g, x, m, lambda row: g.op("ReduceSum", g.op("Mul", matrix, row), g.constant([1]), keepdims=0))


def write_native_column_sum(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    """A package's own layout, summed over K by a reduction."""
    matrix = g.op("DequantizeLinear", w["q"], w["scale"], axis=0, block_size=BLOCK)

    def one(row: ir.Value) -> ir.Value:
        column = g.op("Reshape", row, g.constant([k, 1]))
        return g.op("ReduceSum", g.op("Mul", matrix, column), g.constant([0]), keepdims=0)

    return _rows(g, x, m, one)


FEW = (1, 2, 4)
SOME = (1, 2, 4, 8, 16)
MANY = (16, 64, 512, 2048)
NATIVE = (1, 2, 4, 8, *MANY)
FORMS = {
    "native": Form(pack_native, write_native, NATIVE, constant=True),
    "native, weights as inputs": Form(pack_native, write_native, NATIVE),
    "native, sum": Form(pack_native_rows, write_native_sum, FEW, constant=True),
    "native, sum, weights as inputs": Form(pack_native_rows, write_native_sum, FEW),
    "native, column sum": Form(pack_native, write_native_column_sum, constant=True),
    "native, column sum, weights as inputs": Form(pack_native, write_native_column_sum, FEW),
    "blocks": Form(pack_blocks, write_blocks(True), FEW),
    "blocks, scale last": Form(pack_blocks, write_blocks(False), FEW),
    "blocks, rounded by adding": Form(pack_blocks, write_blocks(True, 1, _split_added), FEW, rounds=True),
    "blocks, rounded by adding, scale last": Form(pack_blocks, write_blocks(False, 1, _split_added), rounds=True),
    "blocks, whole bytes": Form(pack_blocks, write_whole),
    **{
        f"spans, {parts} parts, {name}": Form(pack_spans, write_spans(parts, *how), SOME if parts == 2 else (1,))
        for parts in (1, 2, 4)
        for name, how in {
            "half": (HALF,),
            "float": (FLOAT,),
            "float, added": (FLOAT, "added"),
            "float, no offset": (FLOAT, "floor", False),
        }.items()
    },
    **{f"spans, {parts} parts, all half": Form(pack_spans, write_spans_half(parts), SOME) for parts in (1, 2, 4)},
    "blocks, split 2": Form(pack_blocks, write_blocks(True, 2)),
    "blocks, split 4": Form(pack_blocks, write_blocks(True, 4)),
    "blocks, rows together": Form(pack_blocks, write_together, (2, 4, 8)),
    "pairs": Form(pack_pairs, write_pairs, FEW),
    "pairs of 64": Form(pack_pairs, write_pairs, FEW, block=64),
    "pairs of 32": Form(pack_pairs, write_pairs, block=32),
    "columns": Form(pack_columns, write_columns(False)),
    "columns, scale first": Form(pack_columns, write_columns(True), FEW),
    "package": Form(pack_package, write_columns(False, _split_package)),
    "package, scale first": Form(pack_package, write_columns(True, _split_package)),
    "package, unpacked": Form(pack_package, write_package, (16, 512)),
    "rows": Form(pack_rows, write_rows, FEW),
    "int8": Form(pack_int8, write_int8, FEW),
    "blocks, unpacked": Form(pack_blocks, write_unpacked, MANY),
    "blocks, unsigned": Form(pack_unsigned, write_blocks(False, 1, _split_unsigned), FEW),
    "row halves": Form(pack_row_halves, write_row_halves, FEW),
    "row halves, unpacked": Form(pack_row_halves, write_row_halves_unpacked, MANY),
    "blocks, as pairs": Form(pack_blocks, write_shared_pairs, FEW),
    "blocks, unpacked, left": Form(pack_blocks, write_unpacked_left, MANY),
    "blocks, unpacked, Gemm": Form(pack_blocks, write_unpacked_gemm, MANY),
    "blocks, unpacked, halves": Form(pack_blocks, write_unpacked_halves(False), MANY),
    "blocks, unpacked, halves, left": Form(pack_blocks, write_unpacked_halves(True), MANY),
    "blocks, unpacked in 4": Form(pack_blocks, write_unpacked_in_parts(4), (8, 16, 64)),
}
