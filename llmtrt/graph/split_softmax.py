"""Split-KV (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html) in standard operators: scores, and a
softmax of its own for each split of a context's rows."""

import numpy as np
import onnx_ir as ir

from llmtrt.graph.attention_node import MASKED
from llmtrt.graph.rewrite import Rewrite

FLOAT = ir.DataType.FLOAT
FEW = 4  # splits whose sums and maxima TensorRT writes out in the kernel of what comes next


def scores(new: Rewrite, keys: ir.Value, q: ir.Value, heads_axis: int, group: int) -> list[ir.Value]:
    """Of each of the ``group`` heads that share a key head, which lie along ``heads_axis`` of q (fp32): the sums q · k over
    the last axis, in fp32. A few channels of keys may be so large that fp16 or bf16 would lose what tells rows apart."""
    keys, found = new.cast(keys, FLOAT), []
    for index in range(group):  # sums of one product each, which TensorRT makes in one kernel that reads the keys once
        products = new.op("Mul", keys, new.op("Gather", q, new.constant(np.array(index)), axis=heads_axis))
        found.append(new.op("ReduceSum", products, new.ints(-1), keepdims=0))
    return found


def split_softmax(new: Rewrite, scores: ir.Value, scale: float, seen: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Of scores […, rows of a split]: their weights, which add up to 1, and highest scores and sums of weights […, 1] for
    ``put_together``. Divided before any product, whose sum would be as large as rows are many: past fp16 in a
    long, flat context."""
    scores = new.op("Mul", scores, new.scalar(scale, FLOAT))
    scores = new.op("Where", seen, scores, new.constant(np.array(MASKED, np.float32)))
    highest = new.op("ReduceMax", scores, new.ints(-1), keepdims=1)
    weights = new.op("Exp", new.op("Sub", scores, highest))
    total = new.op("ReduceSum", weights, new.ints(-1), keepdims=1)
    return new.op("Div", weights, total), highest, total


def put_together(
    new: Rewrite,
    parts: ir.Value,
    highest: ir.Value,
    total: ir.Value,
    axis: int,
    splits: int,
    each: tuple[int, ...],
) -> ir.Value:
    """Of the splits' ``parts`` […, splits, *each], splits along ``axis``, and what ``split_softmax`` gave for them: what one
    softmax over all would have given, […, 1, *each]."""
    one = (*each[:-1], 1)
    top = _over(new, "ReduceMax", highest, axis, splits, one)
    share = new.op("Mul", total, new.op("Exp", new.op("Sub", highest, top)))
    # Not parts · (share / sum of shares): of a value that a kernel has whole and, in a sum that is written out, in slices,
    # TensorRT-RTX 1.6.1 takes the element at hand for the first slice (as its source shows; NaN in short contexts).
    above = _over(new, "ReduceSum", new.op("Mul", parts, share), axis, splits, each)
    return new.op("Div", above, _over(new, "ReduceSum", share, axis, splits, one))


def _over(new: Rewrite, operator: str, x: ir.Value, axis: int, splits: int, each: tuple[int, ...]) -> ir.Value:
    """A reduction over the ``splits``, a power of FEW or times 2, as those of FEW and of what they leave."""
    while splits > FEW:
        splits //= FEW
        x = new.op("Reshape", x, new.ints(*[0] * axis, splits, FEW, *each))
        x = new.op(operator, x, new.ints(axis + 1), keepdims=0)
    return new.op(operator, x, new.ints(axis), keepdims=1)
