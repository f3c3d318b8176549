"""The embedding's row by GatherND, in place of Gather.

TensorRT-RTX 1.6 takes the row in the one block of threads of the first norm: of a Gather, one number and one wait for memory
after the other, 17 µs of a step of 4,096 columns on an H100, and by vectors of a GatherND, 4.
"""

import onnx_ir as ir

from llmtrt.graph.lowering import Lowering, Target
from llmtrt.graph.rewrite import Rewrite


def _lookups(model: ir.Model) -> list[ir.Node]:
    """Each Gather(table [V, K] of floats, input_ids)."""
    return [
        node
        for value in model.graph.inputs
        if value.name == "input_ids"
        for node in value.consumers()
        if node.op_type == "Gather" and not node.attributes and node.inputs[0].dtype.is_floating_point()
    ]


def _applies(model: ir.Model, target: Target) -> bool:
    return target.one_row and bool(_lookups(model))


def _apply(model: ir.Model, target: Target) -> ir.Model:
    for node in _lookups(model):
        new = Rewrite(node)
        table, ids = node.inputs
        new.replace(new.op("GatherND", table, new.op("Unsqueeze", ids, new.ints(2))))
    return model


LOWERING = Lowering("one_row_embedding", _applies, _apply)
