"""Quantized projections as lowerings find them, MatMul(x, DequantizeLinear(q, scale)), and those of the same x."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmtrt.graph.packed import Matrix
from llmtrt.graph.rewrite import Rewrite


@dataclass(frozen=True)
class Projection:
    """The MatMul ``node``, and its weight ``matrix`` of the name ``name``."""

    node: ir.Node
    name: str
    matrix: Matrix


def projection_of(node: ir.Node) -> Projection | None:
    """That of a MatMul(x, DequantizeLinear(q [K, N], scale)) with INT4 blocks along K, or INT8 columns."""
    source = node.inputs[1].producer() if node.op_type == "MatMul" and len(node.inputs) == 2 else None
    if source is None or source.op_type != "DequantizeLinear":
        return None
    q, scale = source.inputs[:2]
    block = source.attributes["block_size"].value if "block_size" in source.attributes else None
    if q.dtype != (ir.DataType.INT8 if block is None else ir.DataType.INT4):
        return None
    axis = source.attributes["axis"].value if "axis" in source.attributes else 1
    if len(source.inputs) > 2 or axis != (1 if block is None else 0) or None in (q.const_value, scale.const_value):
        return None
    return Projection(node, q.name, Matrix(q.const_value, scale.const_value, block))


def by_input(projections: Sequence[Projection]) -> list[list[Projection]]:
    """Those that multiply the same value and have the same rows and blocks, together."""
    groups: dict[tuple, list[Projection]] = defaultdict(list)
    for each in projections:
        groups[id(each.node.inputs[0]), each.matrix.k, each.matrix.block].append(each)
    return list(groups.values())


def replace(group: Sequence[Projection], new: Rewrite, y: ir.Value) -> None:
    """Puts what ``new`` has, in place of the first of ``group``, for all of it: ``y`` has their columns side by side."""
    if len(group) == 1:
        new.replace(y)
        return
    widths = [each.matrix.n for each in group]
    ends = np.cumsum(widths).tolist()
    parts = [new.op("Slice", y, new.ints(end - width), new.ints(end), new.ints(-1)) for end, width in zip(ends, widths)]
    new.insert()
    for each, part in zip(group, parts):
        (old,) = each.node.outputs
        name, kind, shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, part)
        each.node.graph.remove(each.node, safe=True)
        part.name, part.type, part.shape = name, kind, shape
