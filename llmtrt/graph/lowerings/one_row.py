"""Fixes a decode step's dimensions: one row of one sequence, which is what a plan for it alone is compiled for."""

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from llmtrt.graph.lowering import Lowering, Target

_ROWS = ("input_ids", "positions", "logits_index")  # [B, S] or [B, K]
_VALUES = ("past_", "present_", "logits")  # [B, …]


def _applies(model: ir.Model, target: Target) -> bool:
    return target.one_row


def _apply(model: ir.Model, target: Target) -> ir.Model:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in _ROWS:
            value.shape = ir.Shape([1, 1])
        elif value.name == "logits":
            value.shape = ir.Shape([1, 1, value.shape[2]])
        elif value.name.startswith(_VALUES):
            value.shape = ir.Shape([1, *list(value.shape)[1:]])
    return ShapeInferencePass()(model).model


LOWERING = Lowering("one_row", _applies, _apply)
