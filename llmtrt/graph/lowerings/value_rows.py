"""Keeps the values of a token side by side: past_value_i and present_value_i as [B, 1, capacity, Hkv · D].

Of a cache [B, Hkv, capacity, D] TensorRT-RTX 1.6 copies the rows in sight before it multiplies with them, as it copies
whatever a Slice of dynamic length leaves. Here the rows in sight are where the cache begins, so that a plan can have them
as an input of just that size (``one_row_attention``).
"""

import onnx_ir as ir

from llmtrt.errors import UserError
from llmtrt.graph.lowering import Lowering, Target
from llmtrt.graph.names import PAST_VALUE
from llmtrt.graph.rewrite import Rewrite


def _applies(model: ir.Model, target: Target) -> bool:
    return (target.one_row or target.value_rows) and any(
        value.name.startswith(PAST_VALUE) for value in model.graph.inputs
    )


def _apply(model: ir.Model, target: Target) -> ir.Model:
    for past in model.graph.inputs:
        if past.name.startswith(PAST_VALUE):
            _turn(past)
    return model


def _turn(past: ir.Value) -> None:
    batch, heads, capacity, dim = past.shape
    (scatter,) = past.consumers()
    if scatter.op_type != "TensorScatter":
        raise UserError(f"{past.name} is read by {scatter.name!r}: make the package anew with `llmtrt quantize`")
    (present,) = scatter.outputs
    new = Rewrite(scatter)
    by_tokens = new.op("Transpose", scatter.inputs[1], perm=[0, 2, 1, 3])
    rows = new.op("Reshape", by_tokens, new.ints(0, 1, -1, heads * dim))
    new.insert()
    scatter.replace_input_with(1, rows)
    past.shape = present.shape = ir.Shape([batch, 1, capacity, heads * dim])
    for seen in list(present.consumers()):
        if seen.op_type != "Slice":
            raise UserError(f"{present.name} is read by {seen.name!r}: make the package anew with `llmtrt quantize`")
        new = Rewrite(seen)
        by_tokens = new.op("Reshape", new.op("Slice", *seen.inputs), new.ints(0, -1, heads, dim))
        new.replace(new.op("Transpose", by_tokens, perm=[0, 2, 1, 3]))


LOWERING = Lowering("value_rows", _applies, _apply)
