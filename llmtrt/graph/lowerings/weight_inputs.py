"""Weights as inputs of the network: plans have none, share one copy of them, and need no GPU to be built.

INT4 matrices become the bytes and scales of llmtrt.graph.packed, those that multiply the same value one after the other as
one matrix; the others stay as they are. Each input says by ``weight_of`` what it holds.
"""

from collections import defaultdict
from functools import partial, reduce

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from llmtrt.errors import UserError
from llmtrt.graph import packed
from llmtrt.graph.lowering import Lowering, Target
from llmtrt.graph.packed import HALF, SPAN, Matrix
from llmtrt.graph.rewrite import Rewrite

_FLOAT = ir.DataType.FLOAT
_PARTS = 2  # of a block's bytes that are summed before the reduction
_LEAST_REDUCTION = 8
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


def _padded(new: Rewrite, x: ir.Value, k: int, *lead: int) -> ir.Value:
    """x [..., K] as [*lead, K' / 128, 2, 64]."""
    x = new.op("Reshape", x, new.ints(*lead, k))
    if k % SPAN:
        pads = [0] * len(lead) + [0] + [0] * len(lead) + [packed.spans(k) * SPAN - k]
        x = new.op("Pad", x, new.ints(*pads))
    return new.op("Reshape", x, new.ints(*lead, packed.spans(k), 2, HALF))


def _take(new: Rewrite, x: ir.Value, axis: int, index: int) -> ir.Value:
    return new.op("Gather", x, new.constant(np.array(index)), axis=axis)


def _row(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """x [1, 1, K] → [1, 1, N] in one reduction over all of K, which TensorRT compiles into one kernel.

    With T = v / 16 = hi + (lo + 8) / 16, the sum of lo · x_a + hi · x_b is that of T · 16 x_a + hi · (x_b − 16 x_a) − 8 x_a:
    few instructions a byte, which the kernel's time goes by (tools/search_projection.py). It is computed in fp32, as the
    first two nearly cancel. With a scale for each of lo and hi it is (T − hi) · 16 x_a − 8 x_a and hi · x_b.
    """
    dtype, b, width = weights["scale"].dtype, packed.spans(k), HALF // _PARTS
    apart = "scale_hi" in weights
    bytes = new.op("Reshape", weights["bytes"], new.ints(n, b, _PARTS, width))
    mix = np.array([[16, 0], [0 if apart else -16, 1], [-8, 0]], np.float32)
    factors = _by_itself(new, new.cast(_padded(new, x, k), _FLOAT), mix)
    factors = new.op("Reshape", factors, new.ints(b, len(mix), _PARTS, width))
    lows, highs = [], []
    for part in range(_PARTS):
        a, c, offset = (_take(new, _take(new, factors, 1, index), 1, part) for index in range(len(mix)))
        t = new.op("DequantizeLinear", _take(new, bytes, 2, part), new.scalar(1 / 16, _FLOAT))
        hi = new.op("Floor", t)
        lows.append(new.op("Add", new.op("Mul", new.op("Sub", t, hi) if apart else t, a), offset))
        highs.append(new.op("Mul", hi, c))
    add = partial(new.op, "Add")
    if apart:
        scaled = (
            new.op("Mul", reduce(add, each), new.cast(weights[name], _FLOAT))
            for each, name in ((lows, "scale"), (highs, "scale_hi"))
        )
        p = add(*scaled)
    else:
        p = new.op("Mul", reduce(add, map(add, lows, highs)), new.cast(weights["scale"], _FLOAT))
    y = new.cast(new.op("ReduceSum", p, new.ints(1, 2), keepdims=0), dtype)
    return new.op("Reshape", y, new.ints(1, 1, n))


def _by_itself(new: Rewrite, x: ir.Value, mix: np.ndarray) -> ir.Value:
    """Σ mix[i, j] · x[:, j] of fp32 x [b, 2, 64]: [b, I, 64], in a kernel of its own.

    What computes x would otherwise be computed again for every row of the matrix that it is multiplied with: TensorRT fuses
    everything into a reduction but another reduction, and a sum of fewer than 8 it writes out (as the kernels show that a
    plan of TensorRT-RTX 1.6 holds).
    """
    copies = _LEAST_REDUCTION // 2
    factors = np.concatenate([mix] + [np.zeros_like(mix)] * (copies - 1), 1)[None, :, :, None]
    x = new.op("Concat", *[new.op("Unsqueeze", x, new.ints(1))] * copies, axis=2)
    return new.op("ReduceSum", new.op("Mul", x, new.constant(factors)), new.ints(2), keepdims=0)


def _rows(new: Rewrite, x: ir.Value, weights: dict[str, ir.Value], k: int, n: int) -> ir.Value:
    """x [B, S, K] → [B, S, N]: lo and hi unpacked into a matrix each, for the columns of x that they are for."""
    dtype = weights["scale"].dtype
    parts, columns = _padded(new, x, k, -1), packed.spans(k) * HALF
    v = new.op("DequantizeLinear", weights["bytes"], new.scalar(1, dtype))
    hi = new.op("Floor", new.op("Mul", v, new.scalar(1 / 16, dtype)))
    lo = new.op("Sub", new.op("Sub", v, new.op("Mul", hi, new.scalar(16, dtype))), new.scalar(8, dtype))
    products = []
    for index, (half, scale) in enumerate(((lo, "scale"), (hi, "scale_hi" if "scale_hi" in weights else "scale"))):
        part = new.op("Reshape", _take(new, parts, 2, index), new.ints(-1, columns))
        matrix = new.op("Reshape", new.op("Mul", half, weights[scale]), new.ints(n, columns))
        products.append(new.op("Gemm", part, matrix, transB=1))
    shape = new.op("Concat", new.op("Shape", x, start=0, end=2), new.ints(n), axis=0)
    return new.op("Reshape", new.op("Add", *products), shape)


LOWERING = Lowering("weight_inputs", _applies, _apply)
