"""Projections, the embedding and the head: where weights meet activations."""

import numpy as np
import onnx_ir as ir

from llmtrt.graph.builder import GraphBuilder
from llmtrt.graph.weights import Int4, Int8, Plain, Weights


def linear(
    g: GraphBuilder, weights: Weights, x: ir.Value, name: str, k: int, n: int, dtype: ir.DataType, bias: bool = False
) -> ir.Value:
    """x [B, S, k] · Wᵀ [k, n] (+ bias) → [B, S, n]; ``name`` is the module's name in the checkpoint."""
    with g.scope(name):
        weight = weights.linear(f"{name}.weight", k, n)
        if isinstance(weight, Plain):
            y = plain_product(g, x, weight, k, n)
        else:
            y = g.op("MatMul", _ordered(g, x, weight, name), _dequantized(g, weight))
        if bias:
            y = g.op("Add", y, g.initializer(weights.vector(f"{name}.bias", n, dtype)))
        return y


def plain_product(g: GraphBuilder, x: ir.Value, weight: Plain, k: int, n: int) -> ir.Value:
    """x [B, S, k] times the transposed weight [n, k] → [B, S, n], the weight read as the checkpoint has it.

    Gemm transposes as it reads. A MatMul's [k, n] TensorRT keeps twice where a decode profile is for one row, and a
    Transpose node would make ONNX Runtime's fp16 product half as fast; a tied head reads the embedding itself.
    """
    flat = g.op("Reshape", x, g.constant([-1, k]))
    product = g.op("Gemm", flat, g.initializer(weight.tensor), transB=1)
    shape = g.op("Concat", g.op("Shape", x, start=0, end=2), g.constant([n]), axis=0)
    return g.op("Reshape", product, shape)


def _ordered(g: GraphBuilder, x: ir.Value, weight: Int4 | Int8, name: str) -> ir.Value:
    if isinstance(weight, Int8) or weight.order is None:
        return x
    return g.op("Gather", x, g.initializer(ir.tensor(weight.order.astype(np.int64), name=f"{name}.order")), axis=-1)


def _dequantized(g: GraphBuilder, weight: Int4 | Int8) -> ir.Value:
    q, scale = g.initializer(weight.q), g.initializer(weight.scale)
    if isinstance(weight, Int8):
        return g.op("DequantizeLinear", q, scale, axis=1)
    # This layout and no other is fused into MatMulNBits by ONNX Runtime and into a GEMV by TensorRT.
    return g.op("DequantizeLinear", q, scale, axis=0, block_size=weight.block)


def embedding(
    g: GraphBuilder, weights: Weights, ids: ir.Value, name: str, rows: int, columns: int, dtype: ir.DataType
) -> ir.Value:
    """Rows ``ids`` [B, S] of the table → fp32 [B, S, columns]."""
    with g.scope(name):
        table = weights.table(f"{name}.weight", rows, columns)
        if isinstance(table, Plain):
            return g.cast(g.op("Gather", g.initializer(table.tensor), ids), dtype, ir.DataType.FLOAT)
        packed = g.op("Gather", g.initializer(table.q), ids)
        scale = g.cast(g.op("Gather", g.initializer(table.scale), ids), table.scale.dtype, ir.DataType.FLOAT)
        values = g.op("Cast", _unpack(g, packed, table.bits, columns), to=int(ir.DataType.FLOAT))
        blocks = table.scale.shape[1]
        split = g.op("Reshape", values, g.constant([0, 0, blocks, columns // blocks]))
        product = g.op("Mul", split, g.op("Unsqueeze", scale, g.constant([3])))
        return g.op("Reshape", product, g.constant([0, 0, columns]))


def _unpack(g: GraphBuilder, packed: ir.Value, bits: int, columns: int) -> ir.Value:
    """INT32 [B, S, C] → INT32 [B, S, columns], values in order.

    A DequantizeLinear of the whole table would run at every step, and INT4 has no Gather, so the gathered rows alone are
    taken apart: digit j of x is (x − x mod baseʲ) / baseʲ mod base. Mod is never negative and the division is exact, so it
    does not matter that the last digit takes the sign bit, nor which way a runtime rounds. Every digit comes from x itself:
    where each came from the rest of the one before, TensorRT took 80 s to compile eight of them.
    """
    powers = g.constant([1 << bits * j for j in range(32 // bits)], np.int32)
    base, half = g.constant(1 << bits, np.int32), g.constant(1 << (bits - 1), np.int32)
    words = g.op("Unsqueeze", packed, g.constant([3]))
    above = g.op("Div", g.op("Sub", words, g.op("Mod", words, powers)), powers)
    values = g.op("Sub", g.op("Mod", above, base), half)
    return g.op("Reshape", values, g.constant([0, 0, columns]))
