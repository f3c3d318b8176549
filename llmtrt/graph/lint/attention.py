"""Rules of attention: what TensorRT's parser ignores, rejects or has no kernel for."""

from collections.abc import Iterator

import onnx_ir as ir

from llmtrt.graph.lint.finding import Finding, Rule
from llmtrt.graph.lint.subject import Dim, Subject, attribute, dims, dtype, tensor_input
from llmtrt.graph.lowerings.decomposed_attention import has_kernel

_MASK = "pass a boolean attn_mask made from positions: kv_range <= positions"

CAUSAL = Rule(
    "attention-causal-alignment",
    "error",
    "is_causal is used only where queries and keys are equally many",
    "ONNX and TensorRT align is_causal at the upper left, so that a decode step attends to position 0 alone",
    _MASK,
)
CAUSAL_MASK = Rule(
    "attention-causal-and-mask",
    "error",
    "is_causal and attn_mask are not used together",
    "TensorRT rejects a mask beside is_causal",
    "put the causal part into the mask: kv_range <= positions",
)
NONPAD = Rule(
    "attention-nonpad-ignored",
    "error",
    "Attention has no nonpad_kv_seqlen",
    "TensorRT parses the input and connects it to nothing, so that queries attend to padding",
    _MASK,
)
PAST = Rule(
    "attention-past",
    "error",
    "Attention has neither past_key and past_value nor a second output",
    "TensorRT rejects the node",
    "write the cache with TensorScatter and give Attention the whole of present_*",
)
SOFTCAP = Rule(
    "attention-softcap",
    "error",
    "Attention has no softcap",
    "TensorRT rejects the node",
    "write the scores out as MatMul, Div, Tanh, Mul, Softmax and MatMul",
)
SOFTMAX_PRECISION = Rule(
    "attention-softmax-precision",
    "error",
    "Attention has no softmax_precision",
    "TensorRT rejects the node, whatever the value",
    "leave the attribute out: TensorRT's kernels keep softmax statistics in fp32",
)
MASK_TYPE = Rule(
    "attention-mask-type",
    "error",
    "attn_mask is boolean or of the queries' type",
    "ONNX allows it, TensorRT's compiler fails",
    "pass a boolean mask or Cast it to the queries' type",
)
VALUE_DIM = Rule(
    "attention-value-dim",
    "error",
    "values have the head dimension of keys",
    "ONNX allows it, TensorRT rejects the node",
    "pad the values to the keys' head dimension and slice the result",
)
KERNEL = Rule(
    "attention-no-dedicated-kernel",
    "warning",
    "Attention is in fp16 or bf16 with 4 query heads or more and a head dimension of 16, 24, … 256",
    "TensorRT has no dedicated kernel for a decode step and refuses to build it",
    "`llmtrt build` lowers it to MatMul and Softmax by itself, which is slower; if it is in fp32, quantize to fp16",
)
KV_LENGTHS = Rule(
    "trt-attention-kv-lengths",
    "error",
    "TRT_Attention gets kv_lengths in input slot 5",
    "slots 6 and on are dropped without a word, although its page puts kv_lengths into 7",
    "move kv_lengths to slot 5, or pass a boolean mask",
)
SUBGRAPH = Rule(
    "attention-in-subgraph",
    "error",
    "Attention stands in the main graph",
    'TensorRT-RTX\'s compiler fails on attention inside If or Loop ("unknown input tensor"), though ONNX Runtime runs it',
    "use one form for all phases, or two graphs",
)
RULES = (
    CAUSAL,
    CAUSAL_MASK,
    NONPAD,
    PAST,
    SOFTCAP,
    SOFTMAX_PRECISION,
    MASK_TYPE,
    VALUE_DIM,
    KERNEL,
    KV_LENGTHS,
    SUBGRAPH,
)

_SLOTS = ("query", "key", "value", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")


def check(subject: Subject) -> Iterator[Finding]:
    for node in subject.nodes("Attention"):
        yield from _check_inputs(node)
        yield from _check_shapes(node, subject.lowered)
        if node.graph is not subject.model.graph:
            yield SUBGRAPH.at(node)
    for node in subject.all_nodes:
        if node.op_type == "TRT_Attention":
            for slot in range(6, len(node.inputs)):
                if node.inputs[slot] is not None:
                    yield KV_LENGTHS.at(node, f"{node.inputs[slot].name} in slot {slot}")
            if node.graph is not subject.model.graph:
                yield SUBGRAPH.at(node)


def _check_inputs(node: ir.Node) -> Iterator[Finding]:
    given = {name: value for name, value in zip(_SLOTS, node.inputs) if value is not None}
    if "nonpad_kv_seqlen" in given:
        yield NONPAD.at(node, given["nonpad_kv_seqlen"].name or "")
    if "past_key" in given or "past_value" in given or any(value.name for value in node.outputs[1:]):
        yield PAST.at(node)
    if attribute(node, "softcap", 0.0) != 0.0:
        yield SOFTCAP.at(node, f"softcap = {attribute(node, 'softcap', 0.0)}")
    if "softmax_precision" in node.attributes:
        yield SOFTMAX_PRECISION.at(node)
    if attribute(node, "is_causal", 0) and "attn_mask" in given:
        yield CAUSAL_MASK.at(node)
    mask, query = dtype(given.get("attn_mask")), dtype(given.get("query"))
    if mask is not None and query is not None and mask not in (ir.DataType.BOOL, query):
        yield MASK_TYPE.at(node, f"attn_mask is {mask.name}, the queries {query.name}")


def _check_shapes(node: ir.Node, lowered: bool) -> Iterator[Finding]:
    q, k, v = (dims(tensor_input(node, index)) for index in range(3))
    q_heads, q_rows, head_dim = _split(q, attribute(node, "q_num_heads", None))
    _, kv_rows, key_dim = _split(k, attribute(node, "kv_num_heads", None))
    _, _, value_dim = _split(v, attribute(node, "kv_num_heads", None))
    if attribute(node, "is_causal", 0) and (q_rows is None or q_rows != kv_rows):
        known = not any(_is_unnamed(rows) for rows in (q_rows, kv_rows))
        said = f"{_said(q_rows)} queries, {_said(kv_rows)} keys"
        yield CAUSAL.at(node, said if known else f"{said}, not known to be equally many", None if known else "warning")
    if isinstance(key_dim, int) and isinstance(value_dim, int) and key_dim != value_dim:
        yield VALUE_DIM.at(node, f"keys have the head dimension {key_dim}, values {value_dim}")
    kind = dtype(tensor_input(node, 0))
    if kind is not None and not has_kernel(kind, _known(q_heads, 4), _known(head_dim, 16)):
        said = f"{kind.name}, {_said(q_heads)} query heads, head dimension {_said(head_dim)}"
        yield KERNEL.at(node, said, "error" if lowered else None)


def _split(shape: tuple[Dim, ...] | None, heads: int | None) -> tuple[Dim, Dim, Dim]:
    """(heads, rows, head dimension) of [B, H, S, D], or of [B, S, H · D] with ``heads``."""
    if shape is None or len(shape) not in (3, 4):
        return None, None, None
    if len(shape) == 4:
        return shape[1], shape[2], shape[3]
    width = shape[2]
    return heads, shape[1], width // heads if heads and isinstance(width, int) else None


def _is_unnamed(dim: Dim) -> bool:
    """Whether nobody named this dimension: unknown, or named by shape inference."""
    return dim is None or isinstance(dim, str) and dim.startswith("unk__")


def _known(dim: Dim, otherwise: int) -> int:
    return dim if isinstance(dim, int) else otherwise


def _said(dim: Dim) -> str:
    return "unknown" if dim is None else str(dim)
