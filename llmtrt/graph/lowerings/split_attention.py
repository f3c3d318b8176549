"""Attention of one row as split-KV in standard operators, for decode steps.

The rows of the cache in sight are a few splits with a softmax of their own, put together by their log-sum-exp
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). TensorRT's own attention runs one block of threads
for each head, and copies keys and values first (benchmarks/gpu-attention-third.json).

The graph has both, and an input ``decode_rows``, whose length is the number of a step's rows that take this one: 1 in a
decode step, and then TensorRT's own has none, or 0. As a profile fixes it, a TensorRT that drops what has no rows compiles
each profile with its own form (an ONNX If does not build).
"""

from functools import partial

import numpy as np
import onnx_ir as ir

from llmtrt.graph.attention_node import attentions, caches, kind_of, operands
from llmtrt.graph.lowering import Lowering, Target
from llmtrt.graph.lowerings.decomposed_attention import has_kernel
from llmtrt.graph.rewrite import Rewrite
from llmtrt.graph.split_softmax import FEW, FLOAT, put_together, scores, split_softmax

# µs a layer of FEW and of _MANY on an H100, of one sequence: 13.3 and 15.6 behind 512 rows, 24.3 and 23.6 behind 2,048, 62.8
# and 48.6 behind 8,192. So the first where the cache has up to _SHORT rows.
_MANY, _SHORT = 16, 4096
_AXIS = 3  # of the splits, of what is computed for each


def _of_both_forms(model: ir.Model) -> list[ir.Node]:
    return [node for node in attentions(model) if has_kernel(*kind_of(node))]


def _applies(model: ir.Model, target: Target) -> bool:
    return (
        not (target.one_row or target.prefill)
        and "empty_branches" in target.capabilities
        and bool(_of_both_forms(model))
    )


def _apply(model: ir.Model, target: Target) -> ir.Model:
    decode_rows = ir.Value(name="decode_rows", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["N"]))
    model.graph.inputs.append(decode_rows)
    for node in _of_both_forms(model):
        _put_both(node, decode_rows, target.context_step, FEW if target.capacity <= _SHORT else _MANY)
    return model


def _put_both(node: ir.Node, decode_rows: ir.Value, step: int, splits: int) -> None:
    """Leaves the first N of the S rows of q to splits, N of 1 = S or 0, and S · (1 − N) to TensorRT's own form."""
    new = Rewrite(node)
    (q, k, v, mask), scale = operands(node)
    few = new.op("Shape", decode_rows)
    many = new.op("Mul", new.op("Shape", q, start=2, end=3), new.op("Sub", new.ints(1), few))

    def first(count: ir.Value, x: ir.Value) -> ir.Value:
        return new.op("Slice", x, new.ints(0), count, new.ints(2))

    left = first(many, q)
    left.shape, left.type = ir.Shape([q.shape[0], q.shape[1], None, q.shape[3]]), q.type
    own = new.op("Attention", left, k, v, first(many, mask), scale=scale)
    # A product that changes nothing: without, TensorRT turns q by its angles anew for each row of keys (65 µs, not 37).
    taken = new.op("MatMul", first(few, q), new.constant(np.eye(q.shape[3], dtype=q.dtype.numpy())))
    new.replace(new.op("Concat", own, _in_splits(new, node, taken, first(few, mask), step, splits), axis=2))


def _in_splits(new: Rewrite, node: ir.Node, q: ir.Value, mask: ir.Value, step: int, splits: int) -> ir.Value:
    """Attention(q [B, H, N, D], k, v [B, Hkv, L, D], mask [B, 1, N, L]) → [B, H, N, D] with the keys and values of ``node``,
    N of 0 or 1 and L a multiple of ``step``, as ``splits`` of its rows."""
    dtype, heads, dim = kind_of(node)
    scale = operands(node)[1]
    k, v, length = caches(node)
    kv_heads = k.shape[1]
    group = heads // kv_heads
    batch, count = (new.op("Shape", q, start=axis, end=axis + 1) for axis in (0, 2))
    shaped = partial(new.shaped, allowzero=1)  # N may be 0
    # Sizes written as multiples of what is known: TensorRT pads, and copies for it, what it cannot see to be even.
    steps = new.op("Div", length, new.ints(step))
    rows = new.op("Mul", steps, new.ints(step // splits))
    bounds = (new.ints(0), new.op("Mul", steps, new.ints(step)), new.ints(2))
    k, v = (new.op("Slice", x, *bounds) for x in (k, v))
    if v.producer().inputs[0].shape[1] != kv_heads:  # the values of a token lie side by side
        v = shaped(v, batch, splits, rows, kv_heads, dim)
        v = new.op("Transpose", v, perm=[0, 3, 1, 2, 4])
    k, v = (shaped(x, batch, kv_heads, 1, splits, rows, dim) for x in (k, v))
    q = shaped(new.cast(q, FLOAT), batch, kv_heads, group, count, 1, 1, dim)
    sums = scores(new, k, q, 2, group)
    together = [new.op("Unsqueeze", each, new.ints(-2)) for each in sums]
    together = together[0] if group == 1 else new.op("Concat", *together, axis=-2)  # [B, Hkv, N, splits, group, rows]
    seen = shaped(mask, batch, 1, count, splits, 1, rows)
    weights, highest, total = split_softmax(new, together, scale, seen)
    parts = new.cast(new.op("MatMul", new.cast(weights, dtype), v), FLOAT)  # [B, Hkv, N, splits, group, D]
    y = new.cast(put_together(new, parts, highest, total, _AXIS, splits, (group, dim)), dtype)
    y = shaped(y, batch, kv_heads, count, group, dim)
    return shaped(new.op("Transpose", y, perm=[0, 1, 3, 2, 4]), batch, heads, count, dim)


LOWERING = Lowering("split_attention", _applies, _apply)
