"""Attention of one row of one sequence as split-KV in standard operators, where a decode step has a plan of its own.

The rows of the cache in sight are a few splits with a softmax of their own, put together by their log-sum-exp
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). TensorRT's own attention runs one block of threads
for each head, and copies keys and values first (tools/search_attention.py measured both).
"""

from functools import reduce
from math import prod

import numpy as np
import onnx_ir as ir

from llmtrt.graph.attention_node import MASKED, attentions, caches, kind_of, operands
from llmtrt.graph.lowering import Lowering, Target
from llmtrt.graph.rewrite import Rewrite

_FLOAT = ir.DataType.FLOAT
# µs a layer of the one and the other on an H100: 13.4 and 16.2 behind 512 rows, 23.8 and 24.4 behind 2,048, 55.0 and 49.4
# behind 8,192. So the first where the cache has up to _SHORT rows. Over two axes of so few TensorRT writes the maximum and
# the sums out, in the kernel of what comes next; over sixteen they are kernels of their own.
_SPLITS, _MANY_SPLITS, _SHORT = (2, 4), (16,), 4096


def _applies(model: ir.Model, target: Target) -> bool:
    return target.one_row and bool(attentions(model))


def _apply(model: ir.Model, target: Target) -> ir.Model:
    for node in attentions(model):
        split(node, target.context_step, splits_of(target.capacity))
    return model


def splits_of(capacity: int) -> tuple[int, ...]:
    """The splits of a cache of ``capacity`` rows, axis by axis."""
    return _SPLITS if capacity <= _SHORT else _MANY_SPLITS


def split(node: ir.Node, step: int, splits: tuple[int, ...]) -> None:
    """Rewrites Attention(q [1, H, 1, D], k, v [1, Hkv, L, D], mask [1, 1, 1, L]) with L a multiple of ``step``, as
    splits of its rows along axes of the sizes ``splits``."""
    dtype, heads, dim = kind_of(node)
    (q, _, _, mask), scale = operands(node)
    k, v, length = caches(node)
    kv_heads = k.shape[1]
    group, new = heads // kv_heads, Rewrite(node)
    # Sizes written as multiples of what is known: TensorRT pads, and copies for it, what it cannot see to be even.
    steps = new.op("Div", length, new.ints(step))
    rows = new.op("Mul", steps, new.ints(step // prod(splits)))
    bounds = (new.ints(0), new.op("Mul", steps, new.ints(step)), new.ints(1))
    shape = new.op("Concat", new.ints(kv_heads, *splits), rows, new.ints(dim), axis=0)
    k, v = (
        new.op("Reshape", new.op("Slice", new.op("Reshape", cache, new.ints(kv_heads, -1, dim)), *bounds), shape)
        for cache in (k, v)
    )
    # Products in fp32: a few channels of keys may be so large that scores in fp16 or bf16 lose what tells rows apart.
    q = new.op("Mul", new.cast(q, _FLOAT), new.scalar(scale, _FLOAT))
    q = new.op("Reshape", q, new.ints(kv_heads, group, *(1 for _ in splits), 1, dim))
    keys, scores = new.cast(k, _FLOAT), []
    for index in range(group):  # sums of one product each, which TensorRT makes in one kernel that reads the keys once
        products = new.op("Mul", keys, new.op("Gather", q, new.constant(np.array(index)), axis=1))
        scores.append(new.op("Unsqueeze", new.op("ReduceSum", products, new.ints(-1), keepdims=0), new.ints(-2)))
    scores = scores[0] if group == 1 else new.op("Concat", *scores, axis=-2)  # [Hkv, *splits, group, rows]
    seen = new.op("Reshape", mask, new.op("Concat", new.ints(1, *splits, 1), rows, axis=0))
    scores = new.op("Where", seen, scores, new.constant(np.array(MASKED, np.float32)))
    highest = new.op("ReduceMax", scores, new.ints(-1), keepdims=1)
    weights = new.op("Exp", new.op("Sub", scores, highest))
    total = new.op("ReduceSum", weights, new.ints(-1), keepdims=1)
    # Divided before the product, whose sum would be as large as its rows are many: past fp16 in a long, flat context.
    weights = new.cast(new.op("Div", weights, total), dtype)
    parts = new.cast(new.op("MatMul", weights, v), _FLOAT)  # [Hkv, *splits, group, D]

    def over_splits(operator: str, x: ir.Value) -> ir.Value:
        axes = range(len(splits), 0, -1)
        return reduce(lambda found, axis: new.op(operator, found, new.ints(axis), keepdims=1), axes, x)

    share = new.op("Exp", new.op("Sub", highest, over_splits("ReduceMax", highest)))
    share = new.op("Mul", share, total)
    # Not parts · (share / sum of shares): of a value that a kernel has whole and, in a sum that is written out, in slices,
    # TensorRT-RTX 1.6.1 takes the element at hand for the first slice (as its source shows; NaN in short contexts).
    above, below = over_splits("ReduceSum", new.op("Mul", parts, share)), over_splits("ReduceSum", share)
    y = new.cast(new.op("Div", above, below), dtype)
    new.replace(new.op("Reshape", y, new.ints(1, heads, 1, dim)))


LOWERING = Lowering("split_attention", _applies, _apply)
