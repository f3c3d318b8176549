"""Weights as inputs of the network: plans share one copy of them, have none but a head, and need no GPU to be built.

INT4 and INT8 matrices become the bytes and scales of llmtrt.graph.packed, those that multiply the same value as one matrix;
the others stay as they are. Each input says by ``weight_of`` what it holds. An INT4 head for many rows alone stays in the
plan: of few rows it makes logits, for which TensorRT's own kernel is as fast and needs no room for the whole vocabulary
unpacked, four times the head.
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from llmtrt.errors import UserError
from llmtrt.graph import packed, packed_product
from llmtrt.graph.lowering import Lowering, Target
from llmtrt.graph.projections import Projection, by_input, projection_of, replace
from llmtrt.graph.rewrite import Rewrite

_WEIGHT = "llmtrt.weight"  # in the metadata of an input: the tensor that it is to be given


def weight_of(value: ir.Value) -> ir.TensorProtocol | None:
    """What an input that was a weight is to be given; None for any other."""
    return value.meta.get(_WEIGHT)


def packable_bytes(model: ir.Model) -> int:
    """Bytes of the INT4 matrices, 0 where one of them, or of INT8, cannot be an input."""
    try:
        found = [each for node in model.graph if (each := _projection(node)) is not None]
    except UserError:
        return 0
    return sum(each.matrix.q.nbytes for each in found if each.matrix.block is not None)


def _applies(model: ir.Model, target: Target) -> bool:
    return target.weights == "inputs"


def _apply(model: ir.Model, target: Target) -> ir.Model:
    taken, kept = [], set()
    for each in filter(None, map(_projection, model.graph)):
        if not target.one_row and each.matrix.block is not None and _makes_logits(each.node):
            kept |= {value.name for value in each.node.inputs[1].producer().inputs}
        else:
            taken.append(each)
    for group in by_input(taken):
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


def _projection(node: ir.Node) -> Projection | None:
    """As ``projection_of``; UserError for one whose matrix cannot be packed."""
    found = projection_of(node)
    if found is not None and not packed.can_pack(found.matrix):
        other = "group_size 64 or 128" if found.matrix.n % 2 == 0 else "this one in int8 or kept"
        raise UserError(
            f"{found.name} {list(found.matrix.q.shape.dims)} in blocks of {found.matrix.block} cannot be an input: it takes "
            f"blocks of 64 or of multiples of 128, and an even number of columns: build with --weights plan, or quantize "
            f"with {other}"
        )
    return found


def _input(value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    value.const_value, value.type, value.shape = None, ir.TensorType(tensor.dtype), tensor.shape
    value.meta[_WEIGHT] = tensor
    return value


def _pack(model: ir.Model, group: list[Projection], one_row: bool) -> None:
    """One product in place of the MatMuls of ``group``, and of it the columns of each."""
    first, matrices = group[0].node, [each.matrix for each in group]
    inputs, there = {}, {value.name: value for value in model.graph.inputs}
    for kind, tensor in packed.arrays("+".join(each.name for each in group), matrices).items():
        inputs[kind] = there.get(tensor.name) or _input(ir.val(tensor.name), tensor)
    model.graph.inputs.extend(value for value in inputs.values() if value.name not in there)
    new, n = Rewrite(first), sum(matrix.n for matrix in matrices)
    y = (packed_product.row if one_row else packed_product.rows)(new, first.inputs[0], inputs, matrices[0].k, n)
    replace(group, new, y)


LOWERING = Lowering("weight_inputs", _applies, _apply)
