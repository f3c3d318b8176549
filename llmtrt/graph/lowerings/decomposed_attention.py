"""Attention written out as MatMul, Softmax and MatMul, where TensorRT has no kernel of its own for it.

TensorRT-RTX 1.6 builds IAttention in fp16 and bf16 for head dims of 16, 24, … 256, from 4 query heads on (1 to 3
build for many rows or sequences, but not in a decode profile); every other one, and fp32 at any, ends in "not
supported by a dedicated kernel" or in a failed check of its compiler (measured: head dims 4 to 512, 1 to 32 heads).
"""

import math

import numpy as np
import onnx_ir as ir

from llmtrt.errors import UserError
from llmtrt.graph.lowering import Lowering, Target

_SET = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}  # values that change nothing
_MASKED = float(np.finfo(np.float32).min)  # not -inf: a row that sees nothing must not become NaN and enter the cache


def has_kernel(dtype: ir.DataType, heads: int, head_dim: int) -> bool:
    """Whether TensorRT has an attention kernel for this type, number of query heads and head dimension."""
    return (
        dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        and heads >= 4
        and 16 <= head_dim <= 256
        and head_dim % 8 == 0
    )


def _without_kernel(model: ir.Model) -> list[ir.Node]:
    attentions = (
        node for node in model.graph.all_nodes() if node.op_type == "Attention" and node.domain in ("", "ai.onnx")
    )
    return [node for node in attentions if not has_kernel(*_kind(node))]


def _kind(node: ir.Node) -> tuple[ir.DataType, int, int]:
    """Type, query heads and head dimension of an Attention(q [B, H, S, D], …)."""
    q = node.inputs[0]
    dims = list(q.shape) if q is not None and q.shape is not None else []
    if len(dims) != 4 or not isinstance(dims[1], int) or not isinstance(dims[3], int) or q.dtype is None:
        raise UserError(
            f"node {node.name!r}: the shape of Attention's q should be [B, H, S, D] with known H and D, but is "
            f"{dims}: make the package anew with `llmtrt quantize`"
        )
    return q.dtype, dims[1], dims[3]


def _applies(model: ir.Model, target: Target) -> bool:
    return bool(_without_kernel(model))


def _apply(model: ir.Model, target: Target) -> ir.Model:
    for node in _without_kernel(model):
        _decompose(node)
    return model


def _decompose(node: ir.Node) -> None:
    """Attention(q [B, H, S, D], k, v [B, Hkv, L, D], bool mask [B, 1, S, L]) → y [B, H, S, D].

    The H / Hkv query heads that share a key head are folded into its rows, so that keys are never repeated.
    """
    dtype, _, head_dim = _kind(node)
    attributes = {name: value.value for name, value in node.attributes.items()}
    scale = attributes.pop("scale", 1 / math.sqrt(head_dim))
    odd = sorted(name for name, value in attributes.items() if name not in _SET or value != _SET[name])
    if len(node.inputs) != 4 or any(value is None for value in node.inputs) or len(node.outputs) != 1 or odd:
        raise UserError(
            f"node {node.name!r} is not the graph contract's Attention(q, k, v, mask) → y"
            f"{' (attribute ' + ', '.join(odd) + ')' if odd else ''}: make the package anew with `llmtrt quantize`"
        )
    q, k, v, mask = node.inputs
    tape, count = ir.tape.Tape(), 0

    def op(kind: str, *inputs: ir.Value, **attributes) -> ir.Value:
        nonlocal count
        count += 1
        value = tape.op(kind, list(inputs), attributes, name=f"{node.name}/{count}_{kind}")
        value.name = f"{node.outputs[0].name}/{count}_{kind}"
        return value

    def constant(array: np.ndarray) -> ir.Value:
        return op("Constant", value=ir.tensor(array))

    def ints(*values: int) -> ir.Value:
        return constant(np.array(values, np.int64))

    def scalar(value: float) -> ir.Value:
        return op("Cast", constant(np.array(value, np.float32)), to=int(dtype))

    def fold(x: ir.Value, like: ir.Value) -> ir.Value:
        """[B, H, S, X] as [B, heads of ``like``, H · S / heads, X], or back."""
        return op("Reshape", x, op("Concat", ints(0), op("Shape", like, start=1, end=2), ints(-1, 0), axis=0))

    rows = fold(op("Mul", q, scalar(scale)), k)
    scores = fold(op("MatMul", rows, op("Transpose", k, perm=[0, 1, 3, 2])), q)
    scores = op("Where", mask, op("Cast", scores, to=int(ir.DataType.FLOAT)), constant(np.array(_MASKED, np.float32)))
    weights = op("Cast", op("Softmax", scores, axis=-1), to=int(dtype))
    y = fold(op("MatMul", fold(weights, k), v), q)
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], tape.nodes, node.outputs, [y])


LOWERING = Lowering("decomposed_attention", _applies, _apply)
