"""Rules of the KV cache: TensorScatter as TensorRT's KVCacheUpdate takes it."""

from collections.abc import Iterator

import onnx_ir as ir

from llmtrt.graph.lint.finding import Finding, Rule
from llmtrt.graph.lint.subject import Subject, attribute, dims, dtype, tensor_input

MODE = Rule(
    "cache-circular",
    "error",
    "TensorScatter writes linearly",
    "TensorRT rejects mode=circular",
    "use mode=linear with a capacity for the whole context, and mask what a sliding window hides",
)
AXIS = Rule(
    "cache-axis",
    "error",
    "TensorScatter writes along axis -2 of [B, Hkv, capacity, D]",
    "TensorRT rejects any other axis",
    "keep the cache as [B, Hkv, capacity, D]",
)
PAST_INPUT = Rule(
    "cache-past-not-input",
    "error",
    "the past cache is a network input itself",
    "TensorRT parses the graph and refuses to build it",
    "connect the network input to TensorScatter without a node between, an Identity or a Cast either",
)
PRESENT_OUTPUT = Rule(
    "cache-present-not-output",
    "error",
    "the result of TensorScatter is a network output itself",
    "TensorRT parses the graph and refuses to build it",
    "make the result itself a network output",
)
PAST_READ = Rule(
    "cache-past-read",
    "error",
    "past_* is read by its TensorScatter alone",
    "past_* and present_* share one buffer, so another reader of past_* sees the old or the new rows as the order of nodes "
    "happens to be",
    "read present_* instead",
)
CAPACITY = Rule(
    "cache-capacity",
    "error",
    "the capacity of the cache is static when TensorRT parses it, and symbolic with a name in a package",
    "TensorRT rejects a cache whose sequence length is not static",
    "name the dimension (capacity) in a package; `llmtrt build` makes it static",
)
TYPE = Rule(
    "cache-type",
    "error",
    "the cache is in fp16, bf16 or fp32",
    "TensorRT rejects INT8 and FP8 caches",
    "keep the cache in fp16",
)
RULES = (MODE, AXIS, PAST_INPUT, PRESENT_OUTPUT, PAST_READ, CAPACITY, TYPE)

_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT)


def check(subject: Subject) -> Iterator[Finding]:
    for node in subject.nodes("TensorScatter"):
        past, present = tensor_input(node, 0), node.outputs[0]
        shape = dims(past) or dims(present)
        if (mode := attribute(node, "mode", "linear")) != "linear":
            yield MODE.at(node, f"mode={mode}")
        axis = attribute(node, "axis", -2)
        if axis != -2 and (shape is None or axis != len(shape) - 2):
            yield AXIS.at(node, f"axis={axis}")
        yield from _check_type(node, past)
        if past is None or not past.is_graph_input() or past.graph is not subject.model.graph:
            yield PAST_INPUT.at(node, past.name or "" if past is not None else "")
        else:
            yield from _check_capacity(subject, node, past)
            yield from _check_readers(node, past)
        if not present.is_graph_output() or present.graph is not subject.model.graph:
            yield PRESENT_OUTPUT.at(node, present.name or "")


def _check_type(node: ir.Node, past: ir.Value | None) -> Iterator[Finding]:
    if dtype(past) is not None and dtype(past) not in _TYPES:
        yield TYPE.at(node, f"{past.name} is {dtype(past).name}")


def _check_capacity(subject: Subject, node: ir.Node, past: ir.Value) -> Iterator[Finding]:
    shape = dims(past)
    capacity = shape[-2] if shape is not None and len(shape) >= 2 else None
    if isinstance(capacity, int):
        return
    if subject.lowered:
        yield CAPACITY.at(node, f"the capacity of {past.name} is {capacity or 'unknown'}")
    elif capacity is None:
        yield CAPACITY.at(node, f"the capacity of {past.name} has no name", "warning")


def _check_readers(node: ir.Node, past: ir.Value) -> Iterator[Finding]:
    for reader, index in past.uses():
        if not (reader is node and index == 0) and reader.op_type not in ("Shape", "Size"):
            yield PAST_READ.at(reader, past.name or "")
