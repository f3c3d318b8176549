"""Weights as inputs of the network: plans have none, share one copy of them, and need no GPU to be built.

INT4 matrices become the bytes and scales of llmtrt.graph.packed, those that multiply the same value one after the other as
one matrix; the others stay as they are. Each input says by ``weight_of`` what it holds.
"""

from collections import defaultdict

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from llmtrt.errors import UserError
from llmtrt.graph import packed
from llmtrt.graph.lowering import Lowering, Target
from llmtrt.graph.packed import HALF, SPAN, Matrix
from llmtrt.graph.rewrite import Rewrite

_WEIGHT = "llmtrt.weight"  # in the metadata of an input: the tensor that it is to be given


def weight_of(value: ir.Value) -> ir.TensorProtocol | None:
    """What an input that was a weight is to be given; None for any other."""
    return value.meta.get(_WEIGHT)


def _applies(model: ir.Model, target: Target) -> bool:
    return target.weights == "inputs"


def _apply(model: ir.Model, target: Target) -> ir.Model:
    groups: dict[tuple, list[tuple[ir.Node, str, Matrix]]] = defaultdict(list)
    for node in model.graph:
        found = _int4(node)
        if found is not None:
            name, matrix = found
            groups[id(node.inputs[0]), matrix.k, matrix.block].append((node, name, matrix))
    for group in groups.values():
        _pack(model, group, target.one_row)
    model = RemoveUnusedNodesPass()(model).model
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and len(tensor.shape) > 1:  # vectors are small
            del model.graph.initializers[name]
            model.graph.inputs.append(_input(value, tensor))
    return model


def _int4(node: ir.Node) -> tuple[str, Matrix] | None:
    """Name and matrix of a MatMul(x, DequantizeLinear(q INT4 [K, N], scale)); UserError where it cannot be packed."""
    source = node.inputs[1].producer() if node.op_type == "MatMul" and len(node.inputs) == 2 else None
    if source is None or source.op_type != "DequantizeLinear" or source.inputs[0].dtype != ir.DataType.INT4:
        return None
    name = source.inputs[0].name
    matrix = Matrix(*(value.const_value for value in source.inputs[:2]), source.attributes["block_size"].value)
    if not packed.can_pack(matrix):
        raise UserError(
            f"{name} {list(matrix.q.shape.dims)} in blocks of {matrix.block} cannot be an input: it takes blocks of 64 or a "
            "multiple of it, and an even number of columns: build with --weights plan, or quantize with group_size 64 or 128"
        )
    return name, matrix


def _input(value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    value.const_value, value.type, value.shape = None, ir.TensorType(tensor.dtype), tensor.shape
    value.meta[_WEIGHT] = tensor
    return value


def _pack(model: ir.Model, group: list[tuple[ir.Node, str, Matrix]], one_row: bool) -> None:
    """One product in place of the MatMuls of ``group``, and of it the columns of each."""
    first, matrices = group[0][0], [matrix for *_, matrix in group]
    inputs = {}
    for name, tensor in packed.arrays("+".join(name for _, name, _ in group), matrices).items():
        inputs[name.rsplit(".", 1)[-1]] = _input(ir.val(name), tensor)
    model.graph.inputs.extend(inputs.values())
    new, n = Rewrite(first), sum(matrix.n for matrix in matrices)
    y = (_row if one_row else _rows)(new, first.inputs[0], inputs, matrices[0].k, n)
    if len(group) == 1:
        new.replace(y)
        return
    ends = np.cumsum([matrix.n for matrix in matrices]).tolist()
    parts = [
        new.op("Slice", y, new.ints(end - matrix.n), new.ints(end), new.ints(-1)) for end, matrix in zip(ends, matrices)
    ]
    new.insert()
    for (node, *_), part in zip(group, parts):
        name, kind, shape = node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape
        ir.convenience.replace_all_uses_with(node.outputs[0], part)
        model.graph.remove(node, safe=True)
        part.name, part.type, part.shape = name, kind, shape


def _halves(new: Rewrite, weights: dict[str, ir.Value], dtype: ir.DataType) -> list[ir.Value]:
    """The lower and the upper halves of the bytes as numbers, times their scales: [N, K' / 128, 64] each."""
    v = new.op("DequantizeLinear", weights["bytes"], new.scalar(1, dtype))
    hi = new.op("Floor", new.op("Mul", v, new.scalar(1 / 16, dtype)))
    lo = new.op("Sub", new.op("Sub", v, new.op("Mul", hi, new.scalar(16, dtype))), new.scalar(8, dtype))
    return [new.op("Mul", lo, weights["scale"]), new.op("Mul", hi, weights["scale_hi"])]


def _padded(new: Rewrite, x: ir.Value, k: int, *lead: int) -> ir.Value:
    """x [..., K] as [*lead, K' / 128, 2, 64]."""
    x = new.op("Reshape", x, new.ints(*lead, k))
    if k % SPAN:
        pads = [0] * len(lead) + [0] + [0] * len(lead) + [packed.spans(k) * SPAN - k]
        x = new.op("Pad", x, new.ints(*pads))
    return new.op("Reshape", x, new.ints(*lead, packed.spans(k), 2, HALF))


def _row(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """x [1, 1, K] → [1, 1, N], one sum over all of K: TensorRT compiles it into one kernel that reads the bytes once."""
    dtype = weights["scale"].dtype
    parts = _padded(new, x, k)
    products = [
        new.op("Mul", half, new.op("Gather", parts, new.constant(np.array(index)), axis=1))
        for index, half in enumerate(_halves(new, weights, dtype))
    ]
    y = new.op("ReduceSum", new.op("Add", *products), new.ints(1, 2), keepdims=0)
    return new.op("Reshape", y, new.ints(1, 1, n))


def _rows(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """x [B, S, K] → [B, S, N]: the halves unpacked into a matrix each, for the columns of x that they are for."""
    dtype = weights["scale"].dtype
    parts, columns = _padded(new, x, k, -1), packed.spans(k) * HALF
    products = []
    for index, half in enumerate(_halves(new, weights, dtype)):
        part = new.op("Gather", parts, new.constant(np.array(index)), axis=2)
        part = new.op("Reshape", part, new.ints(-1, columns))
        products.append(new.op("Gemm", part, new.op("Reshape", half, new.ints(n, columns)), transB=1))
    shape = new.op("Concat", new.op("Shape", x, start=0, end=2), new.ints(n), axis=0)
    return new.op("Reshape", new.op("Add", *products), shape)


LOWERING = Lowering("weight_inputs", _applies, _apply)
