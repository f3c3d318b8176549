"""x · W of weights that are packed as llmtrt.graph.packed has them, in standard operators."""

from functools import partial, reduce

import numpy as np
import onnx_ir as ir

from llmtrt.graph.packed import HALF, SPAN, spans
from llmtrt.graph.rewrite import Rewrite

_FLOAT = ir.DataType.FLOAT
_PARTS = 2  # of a block's bytes that are summed before the reduction
_LEAST_REDUCTION = 8


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


def _take(new: Rewrite, x: ir.Value, axis: int, index: int) -> ir.Value:
    return new.op("Gather", x, new.constant(np.array(index)), axis=axis)


def _row_of_int4(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """With T = v / 16 = hi + (lo + 8) / 16, Σ lo · x_a + hi · x_b is Σ T · 16 x_a + hi · (x_b − 16 x_a) − 8 x_a: few
    instructions a byte, which the kernel's time goes by (tools/search_projection.py). It is computed in fp32, as the
    first two nearly cancel. With a scale for each of lo and hi it is (T − hi) · 16 x_a − 8 x_a and hi · x_b.
    """
    dtype, b, width = weights["scale"].dtype, spans(k), HALF // _PARTS
    apart = "scale_hi" in weights
    bytes = new.op("Reshape", weights["bytes"], new.ints(n, b, _PARTS, width))
    mix = np.array([[16, 0], [0 if apart else -16, 1], [-8, 0]], np.float32)
    factors = _by_itself(new, new.cast(_padded(new, x, k), _FLOAT), mix)
    factors = new.op("Reshape", factors, new.ints(b, len(mix), _PARTS, width))
    lows, highs = [], []
    for part in range(_PARTS):
        a, c, offset = (_take(new, _take(new, factors, 1, index), 1, part) for index in range(len(mix)))
        t = new.op("DequantizeLinear", _take(new, bytes, 2, part), new.scalar(1 / 16, _FLOAT))
        hi = new.op("Floor", t)
        lows.append(new.op("Add", new.op("Mul", new.op("Sub", t, hi) if apart else t, a), offset))
        highs.append(new.op("Mul", hi, c))
    add = partial(new.op, "Add")
    if apart:
        scaled = (
            new.op("Mul", reduce(add, each), new.cast(weights[name], _FLOAT))
            for each, name in ((lows, "scale"), (highs, "scale_hi"))
        )
        p = add(*scaled)
    else:
        p = new.op("Mul", reduce(add, map(add, lows, highs)), new.cast(weights["scale"], _FLOAT))
    y = new.cast(new.op("ReduceSum", p, new.ints(1, 2), keepdims=0), dtype)
    return new.op("Reshape", y, new.ints(1, 1, n))


def _row_of_int8(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """The same of whole bytes: Σ w · x in fp32, times the column's scale."""
    b, width = spans(k), SPAN // _PARTS
    bytes = new.op("Reshape", weights["bytes"], new.ints(n, b, _PARTS, width))
    factors = _by_itself(new, new.cast(_padded(new, x, k), _FLOAT), np.eye(2, dtype=np.float32))
    factors = new.op("Reshape", factors, new.ints(b, _PARTS, width))
    products = [
        new.op(
            "Mul",
            new.op("DequantizeLinear", _take(new, bytes, 2, part), new.scalar(1, _FLOAT)),
            _take(new, factors, 1, part),
        )
        for part in range(_PARTS)
    ]
    sums = new.op("ReduceSum", reduce(partial(new.op, "Add"), products), new.ints(1, 2), keepdims=0)
    y = new.cast(new.op("Mul", sums, new.cast(weights["scale"], _FLOAT)), weights["scale"].dtype)
    return new.op("Reshape", y, new.ints(1, 1, n))


def _by_itself(new: Rewrite, x: ir.Value, mix: np.ndarray) -> ir.Value:
    """Σ mix[i, j] · x[:, j] of fp32 x [b, 2, 64]: [b, I, 64], in a kernel of its own.

    What computes x would otherwise be computed again for every row of the matrix that it is multiplied with: TensorRT fuses
    everything into a reduction but another reduction, and a sum of fewer than 8 it writes out (as the kernels show that a
    plan of TensorRT-RTX 1.6 holds).
    """
    copies = _LEAST_REDUCTION // 2
    factors = np.concatenate([mix] + [np.zeros_like(mix)] * (copies - 1), 1)[None, :, :, None]
    x = new.op("Concat", *[new.op("Unsqueeze", x, new.ints(1))] * copies, axis=2)
    return new.op("ReduceSum", new.op("Mul", x, new.constant(factors)), new.ints(2), keepdims=0)


def _rows_of_int4(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """lo and hi unpacked into a matrix each, for the columns of x that they are for."""
    dtype = weights["scale"].dtype
    parts, columns = _padded(new, x, k, -1), spans(k) * HALF
    v = new.op("DequantizeLinear", weights["bytes"], new.scalar(1, dtype))
    hi = new.op("Floor", new.op("Mul", v, new.scalar(1 / 16, dtype)))
    lo = new.op("Sub", new.op("Sub", v, new.op("Mul", hi, new.scalar(16, dtype))), new.scalar(8, dtype))
    products = []
    for index, (half, scale) in enumerate(((lo, "scale"), (hi, "scale_hi" if "scale_hi" in weights else "scale"))):
        part = new.op("Reshape", _take(new, parts, 2, index), new.ints(-1, columns))
        matrix = new.op("Reshape", new.op("Mul", half, weights[scale]), new.ints(n, columns))
        products.append(new.op("Gemm", part, matrix, transB=1))
    return _shaped(new, new.op("Add", *products), x, n)


def _rows_of_int8(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    columns, scale = spans(k) * SPAN, weights["scale"]
    part = new.op("Reshape", _padded(new, x, k, -1), new.ints(-1, columns))
    v = new.op("DequantizeLinear", weights["bytes"], new.scalar(1, scale.dtype))
    matrix = new.op("Mul", new.op("Reshape", v, new.ints(n, columns)), new.op("Unsqueeze", scale, new.ints(1)))
    return _shaped(new, new.op("Gemm", part, matrix, transB=1), x, n)


def _shaped(new: Rewrite, y: ir.Value, x: ir.Value, n: int) -> ir.Value:
    """y [B · S, N] as [B, S, N] of x [B, S, K]."""
    return new.op("Reshape", y, new.op("Concat", new.op("Shape", x, start=0, end=2), new.ints(n), axis=0))
