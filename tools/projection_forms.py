"""INT4 projections written in standard operators: y [M, N] = x [M, K] · W, W in symmetric blocks of 128 along K.

Each form has a layout for the weights, which ``pack`` makes of q [K, N] (−8 … 7) and scale [K / block, N], and which
``write`` puts into a graph. Bytes are v = 16 · hi + lo + 8, so that hi = ⌊v / 16⌋ and lo = v − 16 · hi − 8.

Tried and dropped (µs for a row of 4096 ↔ 14336 on an H100, where TensorRT's own form takes 30).
benchmarks/gpu-projections-first.json: columns or rows of K innermost, and a package's own bytes (148 to 177, 276 with
TensorRT's INT4 type, which it takes apart a byte at a time); sums split along K (92); a scale that has to be unsqueezed, or
is a slice of an array (76 and more: it loads one element at a time); blocks of 32 (147); a byte for two rows (30);
unpacking with the halves put together (181 for 16 rows, against 106). benchmarks/gpu-projections-second.json: sums in fp32
before the reduction (23 to 33), blocks scaled in a second kernel (24), four parts of a block (160), products in fp32 (330
for 16 rows).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import onnx_ir as ir

from llmtrt.graph import packed, packed_product
from llmtrt.graph.builder import GraphBuilder
from llmtrt.quantization.packing import pack_int4

BLOCK, HALF_BLOCK = 128, 64
HALF = ir.DataType.FLOAT16
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


def pack(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """As llmtrt does."""
    tensor = ir.PackedTensor(pack_int4(q), ir.DataType.INT4, shape=ir.Shape(q.shape))
    matrix = packed.Matrix(tensor, ir.tensor(scale), q.shape[0] // len(scale))
    return {name: each.numpy() for name, each in packed.arrays("w", [matrix]).items()}


def pack_int8(q: np.ndarray, scale: np.ndarray) -> Arrays:
    """One weight a byte, and a scale for each column: another matrix, of the same size of numbers."""
    matrix = packed.Matrix(ir.tensor(q), ir.tensor(scale[0]), None)
    return {name: each.numpy() for name, each in packed.arrays("w", [matrix]).items()}


def pack_split(slices: int, at_once: int) -> Callable[[np.ndarray, np.ndarray], Arrays]:
    """bytes as llmtrt's; scale_<c>_<i> [N / C, K / 128 / I, 1] for slice i of K of the c-th of C groups of columns."""

    def split(q: np.ndarray, scale: np.ndarray) -> Arrays:
        found = {"bytes": pack(q, scale)["bytes"]}
        for c, group in enumerate(np.split(scale.T[..., None], at_once)):
            found |= {f"scale_{c}_{i}": np.ascontiguousarray(each) for i, each in enumerate(np.split(group, slices, 1))}
        return found

    return split


def pack_native(q: np.ndarray, scale: np.ndarray) -> Arrays:
    return {"q": q, "scale": scale}


class Hand:
    """A GraphBuilder, as llmtrt.graph.packed_product writes with."""

    def __init__(self, g: GraphBuilder):
        self.op, self._g = g.op, g

    def ints(self, *values: int) -> ir.Value:
        return self._g.constant(values)

    def constant(self, array: np.ndarray) -> ir.Value:
        return self._g.constant(array, array.dtype)

    def scalar(self, value: float, dtype: ir.DataType) -> ir.Value:
        return self._g.constant(value, dtype.numpy())

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", value, to=int(dtype))

    def write_out(self, value: ir.Value, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        self._g.output(value, f"written_out/{value.name}", dtype, shape)
        return value


def write_packed(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    """As llmtrt does."""
    product = packed_product.row if m == 1 else packed_product.rows
    y = product(Hand(g), g.op("Reshape", x, g.constant([1, m, k])), w, k, n)
    return g.op("Reshape", y, g.constant([m, n]))


def _part(g: GraphBuilder, x: ir.Value, axis: int, index: int) -> ir.Value:
    return g.op("Gather", x, g.constant(index), axis=axis)


def _rows(g: GraphBuilder, x: ir.Value, m: int, one: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """``one`` of each row [K] of x [M, K], written out: [M, N]."""
    rows = [g.op("Unsqueeze", one(_part(g, x, 0, row)), g.constant([0])) for row in range(m)]
    return rows[0] if m == 1 else g.op("Concat", *rows, axis=0)


def write_split(parts: int, slices: int, at_once: int) -> Callable:
    """llmtrt's form of a row, for each row, with ``parts`` of a block and ``slices`` of K added up before the reduction, and
    ``at_once`` columns reduced by the same threads."""

    def write(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
        width, blocks, numbers = HALF_BLOCK // parts, k // BLOCK // slices, {}
        bytes = g.op("Reshape", w["bytes"], g.constant([at_once, n // at_once, slices, blocks, parts, width]))
        for c, i, part in np.ndindex(at_once, slices, parts):
            each = _part(g, _part(g, _part(g, bytes, 0, c), 1, i), 2, part)
            t = g.op("DequantizeLinear", each, g.constant(1 / 16, np.float16))
            hi = g.op("Floor", t)
            numbers[c, i, part] = g.op("Sub", g.op("Sub", t, hi), g.constant(0.5, np.float16)), hi

        def one(row: ir.Value) -> ir.Value:
            halves = g.op("Reshape", row, g.constant([k // BLOCK, 2, HALF_BLOCK]))
            factors = g.op("Mul", halves, g.constant([[16], [1]], np.float16))
            factors = Hand(g).write_out(factors, (k // BLOCK, 2, HALF_BLOCK), HALF)
            factors = g.op("Reshape", factors, g.constant([slices, blocks, 2, parts, width]))
            columns = []
            for c in range(at_once):
                sums = []
                for i in range(slices):
                    products = [
                        g.op("Mul", each, _part(g, _part(g, _part(g, factors, 0, i), 1, half), 1, part))
                        for part in range(parts)
                        for half, each in enumerate(numbers[c, i, part])
                    ]
                    sums.append(g.op("Mul", reduce(partial(g.op, "Add"), products), w[f"scale_{c}_{i}"]))
                p = reduce(partial(g.op, "Add"), sums)
                columns.append(g.op("ReduceSum", p, g.constant([1, 2]), keepdims=0))
            return columns[0] if at_once == 1 else g.op("Concat", *columns, axis=0)

        return _rows(g, x, m, one)

    return write


def write_int8(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    v = g.op("DequantizeLinear", g.op("Reshape", w["bytes"], g.constant([n, k])), g.constant(1, np.float16))

    def one(row: ir.Value) -> ir.Value:
        sums = g.op("ReduceSum", g.op("Mul", v, row), g.constant([1]), keepdims=0)
        return g.op("Mul", sums, w["scale"])

    return _rows(g, x, m, one)


def write_native(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    return g.op("MatMul", x, g.op("DequantizeLinear", w["q"], w["scale"], axis=0, block_size=BLOCK))


FEW, MANY = (1, 2, 4), (16, 64, 512, 2048)
FORMS = {
    "native": Form(pack_native, write_native, (1, 2, 4, 8, *MANY), constant=True),
    "native, weights as inputs": Form(pack_native, write_native, (1, 2, *MANY)),
    "packed": Form(pack, write_packed, (1, *MANY)),
    "packed, blocks of 64": Form(pack, write_packed, (1, 512), block=64),
    **{
        f"{parts} parts, {slices} slices, {at_once} columns": Form(
            pack_split(slices, at_once), write_split(parts, slices, at_once), FEW if slices == 2 else (1,)
        )
        for parts, slices, at_once in ((2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 4, 1), (2, 4, 1), (2, 1, 2), (2, 2, 2))
    },
    "int8, packed": Form(pack_int8, write_packed, (1, 512)),
    "int8, one sum": Form(pack_int8, write_int8, FEW),
}
