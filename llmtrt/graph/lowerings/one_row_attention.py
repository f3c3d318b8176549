"""Attention of a decode step of one sequence: split-KV whose values are an input of just the rows in sight.

``value_rows_i`` [N, step, Hkv · D] is the beginning of present_value_i in the layout of ``value_rows``: N steps of rows,
bound to the same memory. TensorRT multiplies with an input as it lies, all heads with the values of all, which costs less
than to copy those of a head together (as it does with whatever a Slice of dynamic length leaves); of the products, each head
takes those with its own values.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from llmtrt.graph.attention_node import attentions, caches, kind_of, operands, refusal
from llmtrt.graph.lowering import Lowering, Target
from llmtrt.graph.names import PAST_VALUE, VALUE_ROWS
from llmtrt.graph.rewrite import Rewrite
from llmtrt.graph.split_softmax import FLOAT, put_together, scores, split_softmax

# More splits are more blocks of threads for the product behind many rows, and more to sum behind few: of 16, a layer takes
# 0.8 µs more than of 8 behind 512 rows on an H100, and 3.5 less behind 8,192.
_FEW, _MANY, _SHORT = 8, 16, 16384


def splits_of(capacity: int) -> int:
    """The splits of a cache of ``capacity`` rows."""
    return _FEW if capacity <= _SHORT else _MANY


def _applies(model: ir.Model, target: Target) -> bool:
    return target.one_row and bool(attentions(model))


def _apply(model: ir.Model, target: Target) -> ir.Model:
    for node in attentions(model):
        split(model, node, target.context_step, splits_of(target.capacity))
    return RemoveUnusedNodesPass()(model).model


def split(model: ir.Model, node: ir.Node, step: int, splits: int) -> None:
    """Rewrites the Attention ``node`` of one row, of contexts that are a multiple of ``step``, in ``splits``."""
    dtype, heads, dim = kind_of(node)
    (q, _, _, mask), scale = operands(node)
    keys, values, _ = caches(node)
    scatter, kv_heads = values.producer(), keys.shape[1]
    if scatter is None or scatter.op_type != "TensorScatter":
        raise refusal(node, " of a cache that TensorScatter wrote")
    past, group, width = scatter.inputs[0], heads // kv_heads, kv_heads * dim
    value_rows = ir.Value(
        name=past.name.replace(PAST_VALUE, VALUE_ROWS), type=past.type, shape=ir.Shape(["N", step, width])
    )
    model.graph.inputs.append(value_rows)
    new = Rewrite(node)

    # Sizes written as multiples of what is known: TensorRT pads, and copies for it, what it cannot see to be even.
    steps = new.op("Shape", value_rows, start=0, end=1)
    rows = new.op("Mul", steps, new.ints(step // splits))
    keys = new.op("Slice", keys, new.ints(0), new.op("Mul", steps, new.ints(step)), new.ints(2))
    # Written out: TensorRT would turn the heads one after the other, in one block of threads for all.
    q = new.write_out(new.op("Reshape", new.cast(q, FLOAT), new.ints(-1)), (heads * dim,), FLOAT)
    q = new.op("Reshape", q, new.ints(kv_heads, group, 1, 1, dim))
    sums = scores(new, new.shaped(keys, kv_heads, splits, rows, dim), q, 1, group)  # [Hkv, splits, rows] each
    together = new.op("Concat", *(new.op("Unsqueeze", each, new.ints(2)) for each in sums), axis=2)
    together = new.op("Transpose", together, perm=[1, 0, 2, 3])  # [splits, Hkv, group, rows]
    together = _after(new, values, together)
    weights, highest, total = split_softmax(new, together, scale, new.shaped(mask, splits, 1, 1, rows))
    weights = new.shaped(new.cast(weights, dtype), splits, heads, rows)
    products = new.op("MatMul", weights, new.shaped(value_rows, splits, rows, width))  # [splits, H, Hkv · D]
    parts = new.cast(_own_values(new, products, splits, kv_heads, group, dim), FLOAT)
    y = new.cast(put_together(new, parts, highest, total, 0, splits, (kv_heads, group, dim)), dtype)
    new.replace(new.op("Reshape", y, new.ints(1, heads, 1, dim)))


def _after(new: Rewrite, written: ir.Value, x: ir.Value) -> ir.Value:
    """``x`` with 4 dimensions, which cannot be there before the cache is ``written``: by nothing else would TensorRT know
    that the input of rows has what the step writes there."""
    one = new.op("Slice", written, new.ints(0, 0), new.ints(1, 1), new.ints(2, 3))
    finite = new.op("Less", new.op("Abs", one), new.scalar(np.inf, written.dtype))
    return new.op("Mul", x, new.op("Where", finite, new.scalar(1, FLOAT), new.scalar(0, FLOAT)))


def _own_values(new: Rewrite, products: ir.Value, splits: int, kv_heads: int, group: int, dim: int) -> ir.Value:
    """Of products [splits, H, Hkv · D] those of each head with the values of its own key head [splits, Hkv, group, D]."""
    rows = new.op("Reshape", products, new.ints(splits, kv_heads * group * kv_heads, dim))
    head, member = np.indices((kv_heads, group))
    return new.op("Gather", rows, new.constant((head * group + member) * kv_heads + head), axis=1)


LOWERING = Lowering("one_row_attention", _applies, _apply)
