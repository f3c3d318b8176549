"""Fixes the rows of the KV cache, which TensorRT's KVCacheUpdate layer (ONNX TensorScatter) needs before parsing."""

import onnx_ir as ir

from llmtrt.errors import UserError
from llmtrt.graph.lowering import Lowering, Target

_CAPACITY_AXIS = 2  # of past_* and present_* [B, Hkv, capacity, D]


def _caches(model: ir.Model) -> list[ir.Value]:
    values = [*model.graph.inputs, *model.graph.outputs]
    return [value for value in values if (value.name or "").startswith(("past_", "present_"))]


def _applies(model: ir.Model, target: Target) -> bool:
    return bool(_caches(model))


def _apply(model: ir.Model, target: Target) -> ir.Model:
    for value in _caches(model):
        dims = [] if value.shape is None else list(value.shape)
        if len(dims) != 4 or isinstance(dims[_CAPACITY_AXIS], int) and dims[_CAPACITY_AXIS] != target.capacity:
            raise UserError(
                f"the graph's {value.name} has the shape {dims}, where [B, Hkv, capacity, D] with capacity symbolic or "
                f"{target.capacity} was expected: make the package anew with `llmtrt quantize`"
            )
        dims[_CAPACITY_AXIS] = target.capacity
        value.shape = ir.Shape(dims)
    return model


LOWERING = Lowering("static_capacity", _applies, _apply)
