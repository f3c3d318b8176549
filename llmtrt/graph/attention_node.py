"""The graph contract's Attention as lowerings find it."""

import math

import numpy as np
import onnx_ir as ir

from llmtrt.errors import UserError

MASKED = float(np.finfo(np.float32).min)  # not -inf: a row that sees nothing must not become NaN and enter the cache
_SET = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}  # values that change nothing


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type == "Attention" and node.domain in ("", "ai.onnx")]


def kind_of(node: ir.Node) -> tuple[ir.DataType, int, int]:
    """Type, query heads and head dimension of an Attention(q [B, H, S, D], …)."""
    q = node.inputs[0]
    dims = list(q.shape) if q is not None and q.shape is not None else []
    if len(dims) != 4 or not isinstance(dims[1], int) or not isinstance(dims[3], int) or q.dtype is None:
        raise UserError(
            f"node {node.name!r}: the shape of Attention's q should be [B, H, S, D] with known H and D, but is "
            f"{dims}: make the package anew with `llmtrt quantize`"
        )
    return q.dtype, dims[1], dims[3]


def operands(node: ir.Node) -> tuple[list[ir.Value], float]:
    """q, k, v, mask and scale of Attention(q [B, H, S, D], k, v [B, Hkv, L, D], bool mask [B, 1, S, L]) → y [B, H, S, D];
    UserError for one that is not of the contract."""
    _, _, head_dim = kind_of(node)
    attributes = {name: value.value for name, value in node.attributes.items()}
    scale = attributes.pop("scale", 1 / math.sqrt(head_dim))
    odd = sorted(name for name, value in attributes.items() if name not in _SET or value != _SET[name])
    if len(node.inputs) != 4 or any(value is None for value in node.inputs) or len(node.outputs) != 1 or odd:
        raise refusal(node, f" (attribute {', '.join(odd)})" if odd else "")
    return list(node.inputs), scale


def caches(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Keys [B, Hkv, capacity, D] and values, likewise or as [B, 1, capacity, Hkv · D], whose first ``length`` [1] rows the
    Attention ``node`` takes, and that."""
    keys, values = (value.producer() for value in node.inputs[1:3])
    while values is not None and values.op_type in ("Transpose", "Reshape"):
        values = values.inputs[0].producer()
    if (
        any(each is None or each.op_type != "Slice" for each in (keys, values))
        or keys.inputs[2] is not values.inputs[2]
    ):
        raise refusal(node, " of the first rows of the cache")
    return keys.inputs[0], values.inputs[0], keys.inputs[2]


def refusal(node: ir.Node, what: str) -> UserError:
    return UserError(
        f"node {node.name!r} is not the graph contract's Attention(q, k, v, mask) → y{what}: make the package anew with "
        "`llmtrt quantize`"
    )
