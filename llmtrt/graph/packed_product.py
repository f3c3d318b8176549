"""x · W of weights that are packed as llmtrt.graph.packed has them, in standard operators."""

from functools import partial, reduce

import numpy as np
import onnx_ir as ir

from llmtrt.graph.packed import HALF, SCALED, SPAN, slices, spans
from llmtrt.graph.rewrite import Rewrite

_FLOAT = ir.DataType.FLOAT
_PARTS = 2  # of a block's bytes that are summed before the reduction


def row(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """x [1, 1, K] → [1, 1, N] in one reduction over all of K, which TensorRT compiles into one kernel.

    ``weights``: the arrays of ``packed.arrays``.
    """
    return (_row_of_int8 if _whole_bytes(weights) else _row_of_int4)(new, x, weights, k, n)


def rows(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """x [B, S, K] → [B, S, N]: the weights unpacked, and a product of matrices."""
    return (_rows_of_int8 if _whole_bytes(weights) else _rows_of_int4)(new, x, weights, k, n)


def _whole_bytes(weights: dict[str, ir.Value]) -> bool:
    return weights["bytes"].shape[2] == SPAN


def _padded(new: Rewrite, x: ir.Value, k: int, *lead: int) -> ir.Value:
    """x [..., K] as [*lead, K' / 128, 2, 64]."""
    x = new.op("Reshape", x, new.ints(*lead, k))
    if k % SPAN:
        pads = [0] * len(lead) + [0] + [0] * len(lead) + [spans(k) * SPAN - k]
        x = new.op("Pad", x, new.ints(*pads))
    return new.op("Reshape", x, new.ints(*lead, spans(k), 2, HALF))


def _scales(weights: dict[str, ir.Value], k: int) -> list[tuple[ir.Value, ...]]:
    """Of each slice of K, that of its blocks or those of their halves."""
    halves = ("scale", "scale_hi") if "scale_hi_0" in weights else ("scale",)
    return [tuple(weights[f"{half}_{index}"] for half in halves) for index in range(slices(k))]


def _halves(new: Rewrite, bytes: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """lo / 16 and hi of bytes v = 16 · hi + lo + 8: with T = v / 16, hi = ⌊T⌋ and lo / 16 = T − hi − 1/2."""
    t = new.op("DequantizeLinear", bytes, new.scalar(1 / SCALED, dtype))
    hi = new.op("Floor", t)
    return new.op("Sub", new.op("Sub", t, hi), new.scalar(1 / 2, dtype)), hi


def _sum_of_parts(new: Rewrite, x: ir.Value, axis: int) -> ir.Value:
    return reduce(partial(new.op, "Add"), (_take(new, x, axis, part) for part in range(_PARTS)))


def _take(new: Rewrite, x: ir.Value, axis: int, index: int) -> ir.Value:
    return new.op("Gather", x, new.constant(np.array(index)), axis=axis)


def _row_of_int4(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """Σ 16 s · (lo / 16 · x_a + hi · x_b / 16), in the dtype of x up to the reduction, which is in fp32: so few instructions
    and registers a byte that memory is what the kernel waits for.
    """
    scales = _scales(weights, k)
    dtype, count, width = scales[0][0].dtype, len(scales), HALF // _PARTS
    blocks, add = spans(k) // count, partial(new.op, "Add")
    factors = _factors(new, x, k, (1, 1 / SCALED), dtype)
    factors = new.op("Reshape", factors, new.ints(count, blocks, 2, _PARTS, width))
    halves = [
        new.op(
            "Mul",
            new.op("Reshape", each, new.ints(n, count, blocks, _PARTS, width)),
            _take(new, factors, 2, half),
        )
        for half, each in enumerate(_halves(new, weights["bytes"], dtype))
    ]
    # Slices are taken late: TensorRT reads the same either way, and compiles a graph in the square of its nodes.
    halves = halves if len(scales[0]) == 2 else [add(*halves)]
    halves = [_sum_of_parts(new, each, 3) for each in halves]
    sums = (
        new.op("Mul", _take(new, each, 1, index), of)
        for index, scale in enumerate(scales)
        for each, of in zip(halves, scale)
    )
    return new.op("Reshape", new.op("ReduceSum", reduce(add, sums), new.ints(1, 2), keepdims=0), new.ints(1, 1, n))


def _row_of_int8(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """Σ w · x / 128, in fp32 behind the sums of two, as the column's scale comes last; and 128 times that scale."""
    dtype, blocks, width = weights["scale"].dtype, spans(k), SPAN // _PARTS
    factors = _factors(new, x, k, (1 / SPAN, 1 / SPAN), dtype)
    v = new.op("DequantizeLinear", weights["bytes"], new.scalar(1, dtype))
    p = new.op("Mul", v, new.op("Reshape", factors, new.ints(blocks, SPAN)))
    p = _sum_of_parts(new, new.op("Reshape", p, new.ints(n, blocks, _PARTS, width)), 2)
    sums = new.op("ReduceSum", new.cast(p, _FLOAT), new.ints(1, 2), keepdims=0)
    scale = new.op("Mul", new.cast(weights["scale"], _FLOAT), new.scalar(SPAN, _FLOAT))
    return new.op("Reshape", new.cast(new.op("Mul", sums, scale), dtype), new.ints(1, 1, n))


def _factors(new: Rewrite, x: ir.Value, k: int, factors: tuple[float, float], dtype: ir.DataType) -> ir.Value:
    """x [1, 1, K] as [K' / 128, 2, 64], each of the two times its factor, written out."""
    pair = new.constant(np.array(factors, dtype.numpy()).reshape(2, 1))
    y = new.op("Reshape", new.op("Mul", _padded(new, x, k), pair), new.ints(-1))
    return new.op("Reshape", new.write_out(y, (spans(k) * SPAN,), dtype), new.ints(spans(k), 2, HALF))


def _rows_of_int4(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """lo and hi unpacked into a matrix each, for the columns of x that they are for."""
    scales = [_by_slice(new, each, n) for each in zip(*_scales(weights, k))]
    dtype, parts, columns, products = weights["scale_0"].dtype, _padded(new, x, k, -1), spans(k) * HALF, []
    lo, hi = _halves(new, weights["bytes"], dtype)
    hi = new.op("Mul", hi, new.scalar(1 / SCALED, dtype))
    for index, half in enumerate((lo, hi)):
        part = new.op("Reshape", _take(new, parts, 2, index), new.ints(-1, columns))
        half = new.op("Reshape", half, new.ints(n, slices(k), -1, HALF))
        matrix = new.op("Reshape", new.op("Mul", half, scales[index % len(scales)]), new.ints(n, columns))
        products.append(new.op("Gemm", part, matrix, transB=1))
    return _shaped(new, new.op("Add", *products), x, n)


def _by_slice(new: Rewrite, arrays: tuple[ir.Value, ...], n: int) -> ir.Value:
    """[N, I, K' / 128 / I, 1] of the I slices' scales; with a Concat of them TensorRT would unpack one number at a time."""
    arrays = [new.op("Reshape", each, new.ints(n, 1, -1, 1)) for each in arrays]
    place = np.arange(len(arrays)).reshape(1, -1, 1, 1)
    return reduce(
        lambda found, index: new.op("Where", new.constant(place == index), arrays[index], found),
        range(1, len(arrays)),
        arrays[0],
    )


def _rows_of_int8(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    columns, scale = spans(k) * SPAN, weights["scale"]
    part = new.op("Reshape", _padded(new, x, k, -1), new.ints(-1, columns))
    v = new.op("DequantizeLinear", weights["bytes"], new.scalar(1, scale.dtype))
    matrix = new.op("Mul", new.op("Reshape", v, new.ints(n, columns)), new.op("Unsqueeze", scale, new.ints(1)))
    return _shaped(new, new.op("Gemm", part, matrix, transB=1), x, n)


def _shaped(new: Rewrite, y: ir.Value, x: ir.Value, n: int) -> ir.Value:
    """y [B · S, N] as [B, S, N] of x [B, S, K]."""
    return new.op("Reshape", y, new.op("Concat", new.op("Shape", x, start=0, end=2), new.ints(n), axis=0))
