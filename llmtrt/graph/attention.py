"""Self-attention over a KV cache that is updated in place, and what its layers share: masks and rotary angles."""

import numpy as np
import onnx_ir as ir

from llmtrt.graph.builder import GraphBuilder
from llmtrt.models.rope import Rope

FLOAT = ir.DataType.FLOAT


def rope_angles(g: GraphBuilder, positions: ir.Value, rope: Rope, name: str) -> tuple[ir.Value, ir.Value]:
    """cos and sin, fp32 [B, S, rotary dim / 2], of the positions [B, S]: computed once a step for all layers.

    No table, so nothing bounds the positions and nothing but inv_freq is stored.
    """
    with g.scope(name):
        inv_freq = g.initializer(ir.tensor(rope.inv_freq.astype(np.float32), name=f"{name}.inv_freq"))
        column = g.op("Unsqueeze", g.op("Cast", positions, to=int(FLOAT)), g.constant([2]))
        angles = g.op("Mul", column, inv_freq)
        cos, sin = g.op("Cos", angles), g.op("Sin", angles)
        if rope.scaling != 1.0:
            scaling = g.constant(rope.scaling, np.float32)
            cos, sin = g.op("Mul", cos, scaling), g.op("Mul", sin, scaling)
        return cos, sin


def attention_mask(g: GraphBuilder, positions: ir.Value, kv_range: ir.Value, window: int | None) -> ir.Value:
    """Bool [B, 1, S, L]: whether row s may see cache row l.

    Written from positions, because TensorRT's parser takes Attention(is_causal=1) as upper-left causal and ignores
    nonpad_kv_seqlen.
    """
    with g.scope("mask" if window is None else f"mask_{window}"):
        rows = g.op("Unsqueeze", positions, g.constant([1, 3]))
        columns = g.op("Unsqueeze", kv_range, g.constant([0, 1, 2]))
        mask = g.op("LessOrEqual", columns, rows)
        if window is not None:
            near = g.op("Greater", columns, g.op("Sub", rows, g.constant(window)))
            mask = g.op("And", mask, near)
        return mask


def rotate(
    g: GraphBuilder,
    x: ir.Value,
    angles: tuple[ir.Value, ir.Value],
    rotary_dim: int,
    head_dim: int,
    source: ir.DataType,
    dtype: ir.DataType,
) -> ir.Value:
    """RoPE in fp32 of x [B, H, S, D], which has the type ``source``; the result has ``dtype``."""
    partial = {"rotary_embedding_dim": rotary_dim} if rotary_dim != head_dim else {}
    turned = g.op("RotaryEmbedding", g.cast(x, source, FLOAT), *angles, **partial)
    return g.cast(turned, FLOAT, dtype)


def update_cache(
    g: GraphBuilder, index: int, which: str, past: ir.Value, new: ir.Value, write_at: ir.Value
) -> ir.Value:
    """past [B, Hkv, C, D] with rows ``write_at`` [B] … + S replaced by new [B, Hkv, S, D].

    The result is a network output and its buffer is the input's own, so nothing is copied.
    """
    with g.scope(f"present_{which}_{index}"):
        return g.op("TensorScatter", past, new, write_at, axis=2, mode="linear")


def attend(
    g: GraphBuilder,
    q: ir.Value,
    keys: ir.Value,
    values: ir.Value,
    mask: ir.Value,
    length: ir.Value,
    scale: float,
    width: int,
) -> ir.Value:
    """softmax(scale · q kᵀ) v over the first ``length`` [1] cache rows: q [B, H, S, D] → [B, S, width = H · D]."""
    bounds = (g.constant([0]), length, g.constant([2]))
    y = g.op("Attention", q, g.op("Slice", keys, *bounds), g.op("Slice", values, *bounds), mask, scale=scale)
    return g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.constant([0, 0, width]))


def split_heads(g: GraphBuilder, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """[B, S, heads · D] → [B, S, heads, D]."""
    return g.op("Reshape", x, g.constant([0, 0, heads, head_dim]))
