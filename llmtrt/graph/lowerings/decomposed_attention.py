"""Attention written out as MatMul, Softmax and MatMul, where TensorRT has no kernel of its own for it.

TensorRT-RTX 1.6 builds IAttention in fp16 and bf16 for head dims of 16, 24, … 256, from 4 query heads on (1 to 3
build for many rows or sequences, but not in a decode profile); every other one, and fp32 at any, ends in "not
supported by a dedicated kernel" or in a failed check of its compiler (measured: head dims 4 to 512, 1 to 32 heads).
"""

import numpy as np
import onnx_ir as ir

from llmtrt.graph.attention_node import MASKED, attentions, kind_of, operands
from llmtrt.graph.lowering import Lowering, Target
from llmtrt.graph.rewrite import Rewrite


def has_kernel(dtype: ir.DataType, heads: int, head_dim: int) -> bool:
    """Whether TensorRT has an attention kernel for this type, number of query heads and head dimension."""
    return (
        dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        and heads >= 4
        and 16 <= head_dim <= 256
        and head_dim % 8 == 0
    )


def _without_kernel(model: ir.Model) -> list[ir.Node]:
    return [node for node in attentions(model) if not has_kernel(*kind_of(node))]


def _applies(model: ir.Model, target: Target) -> bool:
    return bool(_without_kernel(model))


def _apply(model: ir.Model, target: Target) -> ir.Model:
    for node in _without_kernel(model):
        _decompose(node)
    return model


def _decompose(node: ir.Node) -> None:
    """The H / Hkv query heads that share a key head are folded into its rows, so that keys are never repeated."""
    dtype, *_ = kind_of(node)
    (q, k, v, mask), scale = operands(node)
    new = Rewrite(node)

    def fold(x: ir.Value, like: ir.Value) -> ir.Value:
        """[B, H, S, X] as [B, heads of ``like``, H · S / heads, X], or back."""
        shape = new.op("Concat", new.ints(0), new.op("Shape", like, start=1, end=2), new.ints(-1, 0), axis=0)
        return new.op("Reshape", x, shape)

    rows = fold(new.op("Mul", q, new.scalar(scale, dtype)), k)
    scores = fold(new.op("MatMul", rows, new.op("Transpose", k, perm=[0, 1, 3, 2])), q)
    scores = new.op("Where", mask, new.cast(scores, ir.DataType.FLOAT), new.constant(np.array(MASKED, np.float32)))
    weights = new.cast(new.op("Softmax", scores, axis=-1), dtype)
    new.replace(fold(new.op("MatMul", fold(weights, k), v), q))


LOWERING = Lowering("decomposed_attention", _applies, _apply)
