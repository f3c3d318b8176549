"""Attention of one row as split-KV in standard operators, for decode steps.

The rows of the cache in sight are a few splits with a softmax of their own, put together by their log-sum-exp
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). TensorRT's own attention runs one block of threads
for each head, and copies keys and values first (tools/search_attention.py measured both).

A graph for one row has that form alone. One for any number of rows has both, and an input ``decode_rows``, whose length is
the number of a step's rows that take it: 1 in a decode step, and then TensorRT's own has none, or 0. As a profile fixes it,
a TensorRT that drops what has no rows compiles each profile with its own form (an ONNX If does not build).
"""

import numpy as np
import onnx_ir as ir

from llmtrt.graph.attention_node import MASKED, attentions, caches, kind_of, operands
from llmtrt.graph.lowering import Lowering, Target
from llmtrt.graph.lowerings.decomposed_attention import has_kernel
from llmtrt.graph.rewrite import Rewrite

_FLOAT = ir.DataType.FLOAT
# µs a layer of the one and the other on an H100: 13.3 and 15.6 behind 512 rows, 24.3 and 23.6 behind 2,048, 62.8 and 48.6
# behind 8,192. So the first where the cache has up to _SHORT rows.
_SPLITS, _MANY_SPLITS, _SHORT = 4, 16, 4096
_AXIS = 3  # of the splits, of what is computed for each


def _of_both_forms(model: ir.Model) -> list[ir.Node]:
    return [node for node in attentions(model) if has_kernel(*kind_of(node))]


def _applies(model: ir.Model, target: Target) -> bool:
    if target.one_row:
        return bool(attentions(model))
    return not target.prefill and "empty_branches" in target.capabilities and bool(_of_both_forms(model))


def _apply(model: ir.Model, target: Target) -> ir.Model:
    splits = splits_of(target.capacity)
    if target.one_row:
        for node in attentions(model):
            split(node, target.context_step, splits)
        return model
    decode_rows = ir.Value(name="decode_rows", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["N"]))
    model.graph.inputs.append(decode_rows)
    for node in _of_both_forms(model):
        _put_both(node, decode_rows, target.context_step, splits)
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


def splits_of(capacity: int) -> int:
    """The splits of a cache of ``capacity`` rows."""
    return _SPLITS if capacity <= _SHORT else _MANY_SPLITS


def split(node: ir.Node, step: int, splits: int) -> None:
    """Rewrites the Attention ``node`` of a step of one row, of contexts that are a multiple of ``step``, in ``splits``."""
    new = Rewrite(node)
    new.replace(_in_splits(new, node, node.inputs[0], node.inputs[3], step, splits))


def _in_splits(new: Rewrite, node: ir.Node, q: ir.Value, mask: ir.Value, step: int, splits: int) -> ir.Value:
    """Attention(q [B, H, N, D], k, v [B, Hkv, L, D], mask [B, 1, N, L]) → [B, H, N, D] with the keys and values of ``node``,
    N of 0 or 1 and L a multiple of ``step``, as ``splits`` of its rows."""
    dtype, heads, dim = kind_of(node)
    scale = operands(node)[1]
    k, v, length = caches(node)
    kv_heads = k.shape[1]
    group = heads // kv_heads
    batch, count = (new.op("Shape", q, start=axis, end=axis + 1) for axis in (0, 2))

    def shaped(x: ir.Value, *sizes: ir.Value | int) -> ir.Value:
        """``x`` reshaped; ``sizes`` are sizes or, from the graph, int64 [1]."""
        parts = [new.ints(size) if isinstance(size, int) else size for size in sizes]
        return new.op("Reshape", x, new.op("Concat", *parts, axis=0), allowzero=1)

    # Sizes written as multiples of what is known: TensorRT pads, and copies for it, what it cannot see to be even.
    steps = new.op("Div", length, new.ints(step))
    rows = new.op("Mul", steps, new.ints(step // splits))
    bounds = (new.ints(0), new.op("Mul", steps, new.ints(step)), new.ints(2))
    k, v = (shaped(new.op("Slice", x, *bounds), batch, kv_heads, 1, splits, rows, dim) for x in (k, v))
    # Products in fp32: a few channels of keys may be so large that scores in fp16 or bf16 lose what tells rows apart.
    q = shaped(new.cast(q, _FLOAT), batch, kv_heads, group, count, 1, 1, dim)
    keys, scores = new.cast(k, _FLOAT), []
    for index in range(group):  # sums of one product each, which TensorRT makes in one kernel that reads the keys once
        products = new.op("Mul", keys, new.op("Gather", q, new.constant(np.array(index)), axis=2))
        scores.append(new.op("Unsqueeze", new.op("ReduceSum", products, new.ints(-1), keepdims=0), new.ints(-2)))
    scores = scores[0] if group == 1 else new.op("Concat", *scores, axis=-2)  # [B, Hkv, N, splits, group, rows]
    seen = shaped(mask, batch, 1, count, splits, 1, rows)
    scores = new.op("Mul", scores, new.scalar(scale, _FLOAT))
    scores = new.op("Where", seen, scores, new.constant(np.array(MASKED, np.float32)))
    highest = new.op("ReduceMax", scores, new.ints(-1), keepdims=1)
    weights = new.op("Exp", new.op("Sub", scores, highest))
    total = new.op("ReduceSum", weights, new.ints(-1), keepdims=1)
    # Divided before the product, whose sum would be as large as its rows are many: past fp16 in a long, flat context.
    weights = new.cast(new.op("Div", weights, total), dtype)
    parts = new.cast(new.op("MatMul", weights, v), _FLOAT)  # [B, Hkv, N, splits, group, D]
    found = parts, highest, total
    y = _put_together(new, *found) if splits == _SPLITS else _put_many_together(new, *found, splits)
    y = shaped(new.cast(y, dtype), batch, kv_heads, count, group, dim)
    return shaped(new.op("Transpose", y, perm=[0, 1, 3, 2, 4]), batch, heads, count, dim)


def _over_splits(new: Rewrite, operator: str, x: ir.Value) -> ir.Value:
    return new.op(operator, x, new.ints(_AXIS), keepdims=1)


def _put_together(new: Rewrite, parts: ir.Value, highest: ir.Value, total: ir.Value) -> ir.Value:
    """[…, 1, group, D] of the splits' ``parts`` […, splits, group, D] by their ``highest`` scores and ``total`` weights
    […, splits, group, 1]: so few that TensorRT writes all out in the kernel of what comes next."""
    share = new.op("Exp", new.op("Sub", highest, _over_splits(new, "ReduceMax", highest)))
    share = new.op("Mul", share, total)
    # Not parts · (share / sum of shares): of a value that a kernel has whole and, in a sum that is written out, in slices,
    # TensorRT-RTX 1.6.1 takes the element at hand for the first slice (as its source shows; NaN in short contexts).
    above = _over_splits(new, "ReduceSum", new.op("Mul", parts, share))
    return new.op("Div", above, _over_splits(new, "ReduceSum", share))


def _put_many_together(new: Rewrite, parts: ir.Value, highest: ir.Value, total: ir.Value, splits: int) -> ir.Value:
    """The same of a multiple of that, in two kernels: their shares by a softmax, along the last axis; and a sum of sums that
    are written out, which takes half the time of a reduction. With the shares written out too it is one kernel, which takes
    1 µs less, and a build 40 % longer (16 layers of the 8B shape)."""
    last = [0, 1, 2, 4, 5, _AXIS]
    share = new.op("Softmax", new.op("Transpose", new.op("Add", highest, new.op("Log", total)), perm=last), axis=-1)
    parts = new.op("Mul", parts, new.op("Transpose", share, perm=[0, 1, 2, 5, 3, 4]))
    sums = [
        _over_splits(new, "ReduceSum", new.op("Slice", parts, *map(new.ints, (at, at + _SPLITS, _AXIS))))
        for at in range(0, splits, _SPLITS)
    ]
    return _over_splits(new, "ReduceSum", new.op("Concat", *sums, axis=_AXIS))


LOWERING = Lowering("split_attention", _applies, _apply)
