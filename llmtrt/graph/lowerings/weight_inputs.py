"""Weights as inputs of the network: plans share one copy of them, have none but a head, and need no GPU to be built.

INT4 and INT8 matrices become the bytes and scales of llmtrt.graph.packed, those that multiply the same value as one matrix;
the others stay as they are. Each input says by ``weight_of`` what it holds. An INT4 head for many rows alone stays in the
plan: of few rows it makes logits, for which TensorRT's own kernel is as fast and needs no room for the whole vocabulary
unpacked, four times the head.
"""

from collections import defaultdict

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from llmtrt.errors import UserError
from llmtrt.graph import packed, packed_product
from llmtrt.graph.lowering import Lowering, Target
from llmtrt.graph.packed import Matrix
from llmtrt.graph.rewrite import Rewrite

_WEIGHT = "llmtrt.weight"  # in the metadata of an input: the tensor that it is to be given


def weight_of(value: ir.Value) -> ir.TensorProtocol | None:
    """What an input that was a weight is to be given; None for any other."""
    return value.meta.get(_WEIGHT)


def packs(model: ir.Model) -> bool:
    """Whether there are INT4 matrices, all of which can be inputs."""
    try:
        found = [matrix for node in model.graph if (matrix := _matrix(node)) is not None]
    except UserError:
        return False
    return any(matrix.block is not None for _, matrix in found)


def _applies(model: ir.Model, target: Target) -> bool:
    return target.weights == "inputs"


def _apply(model: ir.Model, target: Target) -> ir.Model:
    groups: dict[tuple, list[tuple[ir.Node, str, Matrix]]] = defaultdict(list)
    kept = set()
    for node in model.graph:
        found = _matrix(node)
        if found is None:
            continue
        name, matrix = found
        if not target.one_row and matrix.block is not None and _makes_logits(node):
            kept |= {value.name for value in node.inputs[1].producer().inputs}
        else:
            groups[id(node.inputs[0]), matrix.k, matrix.block].append((node, name, matrix))
    for group in groups.values():
        _pack(model, group, target.one_row)
    model = RemoveUnusedNodesPass()(model).model
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if name not in kept and isinstance(tensor, ir.ExternalTensor) and len(tensor.shape) > 1:  # vectors are small
            del model.graph.initializers[name]
            model.graph.inputs.append(_input(value, tensor))
    return model


def _makes_logits(node: ir.Node) -> bool:
    """Whether what ``node`` makes becomes an output, through nothing but nodes whose other operands are constants."""
    (value,) = node.outputs
    users = list(value.consumers())
    return (
        value.is_graph_output()
        or bool(users)
        and all(sum(map(_varies, user.inputs)) == 1 and _makes_logits(user) for user in users)
    )


def _varies(value: ir.Value) -> bool:
    maker = value.producer()
    return value.const_value is None and (maker is None or maker.op_type != "Constant")


def _matrix(node: ir.Node) -> tuple[str, Matrix] | None:
    """Name and matrix of a MatMul(x, DequantizeLinear(q [K, N], scale)) with INT4 blocks along K, or INT8 columns; UserError
    where it cannot be packed."""
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
    matrix = Matrix(q.const_value, scale.const_value, block)
    if not packed.can_pack(matrix):
        other = "group_size 64 or 128" if matrix.n % 2 == 0 else "this one in int8 or kept"
        raise UserError(
            f"{q.name} {list(matrix.q.shape.dims)} in blocks of {block} cannot be an input: it takes blocks of 64 or of "
            f"multiples of 128, and an even number of columns: build with --weights plan, or quantize with {other}"
        )
    return q.name, matrix


def _input(value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    value.const_value, value.type, value.shape = None, ir.TensorType(tensor.dtype), tensor.shape
    value.meta[_WEIGHT] = tensor
    return value


def _pack(model: ir.Model, group: list[tuple[ir.Node, str, Matrix]], one_row: bool) -> None:
    """One product in place of the MatMuls of ``group``, and of it the columns of each."""
    first, matrices = group[0][0], [matrix for *_, matrix in group]
    inputs, there = {}, {value.name: value for value in model.graph.inputs}
    for kind, tensor in packed.arrays("+".join(name for _, name, _ in group), matrices).items():
        inputs[kind] = there.get(tensor.name) or _input(ir.val(tensor.name), tensor)
    model.graph.inputs.extend(value for value in inputs.values() if value.name not in there)
    new, n = Rewrite(first), sum(matrix.n for matrix in matrices)
    y = (packed_product.row if one_row else packed_product.rows)(new, first.inputs[0], inputs, matrices[0].k, n)
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


LOWERING = Lowering("weight_inputs", _applies, _apply)
