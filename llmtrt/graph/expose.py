"""Makes values inside a graph its outputs, to be looked at."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import onnx_ir as ir

from llmtrt.errors import UserError

_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT)


def expose(model: ir.Model, patterns: Sequence[str]) -> list[str]:
    """Adds to the outputs of ``model`` every floating-point value that a node computes and whose name one of ``patterns``
    (shell wildcards) matches; returns their names in the graph's order.

    Types have to be known (ONNX shape inference). Raises UserError for a pattern that no value matches.
    """
    graph = model.graph
    outputs = set(graph.outputs)
    values = exposable(model)
    for pattern in patterns:
        if not any(fnmatchcase(value.name, pattern) for value in values):
            raise UserError(
                f"no tensor that the graph computes is named like {pattern!r}: names are as in "
                f"{', '.join(value.name for value in values[:: max(1, len(values) // 3)][:3])}"
            )
    chosen = [
        value for value in values if value not in outputs and any(fnmatchcase(value.name, each) for each in patterns)
    ]
    graph.outputs.extend(chosen)
    return [value.name for value in chosen]


def exposable(model: ir.Model) -> list[ir.Value]:
    """The floating-point values that nodes of ``model`` compute from its inputs, in the graph's order.

    What comes of weights alone is left out: as an output, a dequantized matrix would be computed by itself, and no longer
    in the product that it belongs to.
    """
    computed, found = set(model.graph.inputs), []
    for node in model.graph:
        if not computed.isdisjoint(node.inputs):
            computed.update(node.outputs)
            found += [value for value in node.outputs if value.name and value.dtype in _FLOATS]
    return found
