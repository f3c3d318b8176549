"""Rules of quantized weights: the forms that both runtimes take, and take as fast as they can."""

from collections.abc import Iterator

import onnx_ir as ir

from llmtrt.graph.lint.finding import Finding, Rule
from llmtrt.graph.lint.subject import Subject, attribute, dims, dtype, tensor_input

UNSIGNED = Rule(
    "quant-unsigned",
    "error",
    "weights are symmetric signed integers or FP8",
    "TensorRT's parser rejects UINT4 and UINT8 weights",
    "subtract the zero point: INT4 or INT8 without one",
)
ZERO_POINT = Rule(
    "quant-zero-point",
    "error",
    "quantization is symmetric: no zero point, or 0 everywhere",
    "TensorRT's parser rejects other zero points, though ONNX Runtime runs them",
    "quantize symmetrically",
)
BLOCK_REMAINDER = Rule(
    "quant-block-remainder",
    "error",
    "the quantized dimension is a multiple of the block",
    "onnx.checker and ONNX Runtime accept it; TensorRT does not read block_size but divides the dimension by the rows of "
    "scales: it rejects a fraction and silently scales the wrong rows otherwise",
    "choose a block that divides the dimension, or leave the weight unquantized",
)
SCALE_SHAPE = Rule(
    "quant-scale-shape",
    "error",
    "there are as many scales as block_size says",
    "ONNX Runtime fails when it runs; TensorRT does not read block_size and takes the blocks that the scales' shape implies",
    "write ceil(dimension / block_size) rows of scales",
)
BLOCK_SIZE = Rule(
    "quant-block-size",
    "warning",
    "the block is 16, 32, 64, 128 or 256 (or 512 or 1024 with fp32 scales)",
    "ONNX Runtime does not fuse it into MatMulNBits and dequantizes the whole weight at every step",
    "quantize with a block of 32, 64 or 128",
    package_only=True,
)
LAYOUT = Rule(
    "quant-layout",
    "warning",
    "weights are [K, N] with blocks along axis 0, straight into MatMul",
    "ONNX Runtime does not fuse a transposed weight into MatMulNBits: a 135M decoder ran at 0.5 instead of 29 tokens/s",
    "store the weight as [K, N], scales as [K / block, N], axis=0, without a Transpose",
    package_only=True,
)
CONSUMER = Rule(
    "quant-constant-consumer",
    "error",
    "a quantized constant goes straight into DequantizeLinear, without a Transpose or Reshape between",
    "TensorRT takes INT8, INT4, FP8 and FP4 constants for quantized weights and refuses to build any other use of them",
    "for integers that are not weights use INT32; four INT8 packed in one INT32 cost no more",
)
INT4_GATHER = Rule(
    "quant-int4-gather",
    "error",
    "rows are not gathered from an INT4 tensor",
    "ONNX does not define Gather on INT4, and neither runtime has it",
    "pack eight INT4 into one INT32, Gather those and take them apart by Div and Mod",
)
EMBEDDING = Rule(
    "quant-embedding",
    "warning",
    "an embedding is gathered first and dequantized after",
    "ONNX Runtime dequantizes the whole table at every step (92 to 265 ms were measured)",
    "pack four INT8 into one INT32, Gather those and take them apart by Div and Mod",
    package_only=True,
)
UINT8_CONSTANT = Rule(
    "uint8-constant",
    "warning",
    "big constants are not UINT8",
    "TensorRT widens them to INT32: the plan gets four times their size",
    "pack four of them into one INT32",
)
CONSTANT_TYPE = Rule(
    "constant-type",
    "error",
    "constants have a type that TensorRT knows",
    "TensorRT's parser rejects the initializer",
    "store integers as INT32 or INT64, INT4 as signed and FP8 as E4M3FN",
)
BF16 = Rule(
    "bf16-onnxruntime",
    "warning",
    "a package that is to run on ONNX Runtime CPU has no bf16",
    "ONNX Runtime CPU has no bf16 MatMul, Add, Mul, Softmax or DequantizeLinear: the model runs on TensorRT alone",
    "use fp16 or fp32 where a laptop is to run it",
    package_only=True,
)
RULES = (
    UNSIGNED,
    ZERO_POINT,
    BLOCK_REMAINDER,
    SCALE_SHAPE,
    BLOCK_SIZE,
    LAYOUT,
    CONSUMER,
    INT4_GATHER,
    EMBEDDING,
    UINT8_CONSTANT,
    CONSTANT_TYPE,
    BF16,
)

_FUSED_BLOCKS = (16, 32, 64, 128, 256)
_FUSED_IN_FP32 = (512, 1024)
_T = ir.DataType
_UNSIGNED = {_T.UINT4, _T.UINT8, _T.UINT2}
_FOUR_BIT = {_T.INT4, _T.UINT4, _T.FLOAT4E2M1}
_QUANTIZED = {_T.INT8, _T.INT4, _T.FLOAT8E4M3FN, _T.FLOAT4E2M1}
_UNKNOWN_TYPES = {
    _T.UINT4,
    _T.INT2,
    _T.UINT2,
    _T.INT16,
    _T.UINT16,
    _T.UINT32,
    _T.UINT64,
    _T.FLOAT8E5M2,
    _T.FLOAT8E4M3FNUZ,
    _T.FLOAT8E5M2FNUZ,
}
_SMALL_BYTES = 1024


def check(subject: Subject) -> Iterator[Finding]:
    for node in subject.nodes("DequantizeLinear"):
        yield from _check_values(subject, node)
        yield from _check_blocks(node)
        yield from _check_uses(node)
    for value, tensor in subject.constants():
        yield from _check_constant(value, tensor)
    for node in subject.nodes("Gather"):
        if dtype(tensor_input(node, 0)) in _FOUR_BIT:
            yield INT4_GATHER.at(node)
    yield from _check_bf16(subject)


def _check_values(subject: Subject, node: ir.Node) -> Iterator[Finding]:
    weight, zero_point = tensor_input(node, 0), tensor_input(node, 2)
    if dtype(weight) in _UNSIGNED:
        yield UNSIGNED.at(node, f"{weight.name} is {dtype(weight).name}")
    elif zero_point is not None:
        zeros = subject.values(zero_point)
        if zeros is not None and (zeros != 0).any():
            yield ZERO_POINT.at(node, f"{zero_point.name} is not 0 everywhere")


def _check_blocks(node: ir.Node) -> Iterator[Finding]:
    block, axis = attribute(node, "block_size", 0), attribute(node, "axis", 1)
    shape, scales = dims(tensor_input(node, 0)), dims(tensor_input(node, 1))
    if block <= 0:
        return
    if block not in _FUSED_BLOCKS and not (block in _FUSED_IN_FP32 and dtype(tensor_input(node, 1)) == _T.FLOAT):
        yield BLOCK_SIZE.at(node, f"block_size={block}")
    if shape is None or scales is None or len(shape) != len(scales) or not -len(shape) <= axis < len(shape):
        return
    length, rows = shape[axis], scales[axis]
    if not isinstance(length, int) or not isinstance(rows, int):
        return
    if rows != -(-length // block):
        yield SCALE_SHAPE.at(node, f"{rows} rows of scales for {length} / {block}")
    elif length % block and rows > 1:
        then = (
            f"TensorRT takes blocks of {length // rows}" if length % rows == 0 else f"{length} / {rows} is a fraction"
        )
        yield BLOCK_REMAINDER.at(node, f"{length} is not a multiple of the block {block} and {then}")


def _check_uses(node: ir.Node) -> Iterator[Finding]:
    blocked = attribute(node, "block_size", 0) > 0
    for reader, index in node.outputs[0].uses():
        if reader.op_type == "Gather" and index == 0:
            yield EMBEDDING.at(node, f"{reader.name or 'Gather'} gathers from the dequantized table")
        elif blocked and reader.op_type == "Transpose":
            if any(after.op_type in ("MatMul", "Gemm") for after, _ in reader.outputs[0].uses()):
                yield LAYOUT.at(node, "transposed before MatMul")
        elif blocked and reader.op_type == "Gemm" and index == 1 and attribute(reader, "transB", 0):
            yield LAYOUT.at(node, "Gemm with transB=1")


def _check_constant(value: ir.Value, tensor: ir.TensorProtocol) -> Iterator[Finding]:
    kind = tensor.dtype
    if kind in _UNKNOWN_TYPES:
        yield CONSTANT_TYPE.at(value, f"{value.name} is {kind.name}")
    elif kind == _T.UINT8 and tensor.nbytes >= _SMALL_BYTES:
        yield UINT8_CONSTANT.at(value, f"{value.name} has {tensor.nbytes} bytes")
    elif kind in _QUANTIZED:
        for reader, _ in value.uses():
            if reader.op_type not in ("DequantizeLinear", "QuantizeLinear") and not _is_int4_gather(kind, reader):
                yield CONSUMER.at(reader, f"{kind.name} constant {value.name}")


def _is_int4_gather(kind: ir.DataType, reader: ir.Node) -> bool:
    return kind in _FOUR_BIT and reader.op_type == "Gather"


def _check_bf16(subject: Subject) -> Iterator[Finding]:
    """One finding a model: where there is one bf16 tensor there are hundreds."""
    values = [*subject.model.graph.inputs, *(value for value, _ in subject.constants())]
    values += [value for node in subject.all_nodes for value in node.outputs]
    found = [value for value in values if dtype(value) == _T.BFLOAT16]
    if found:
        yield BF16.at(found[0], f"{len(found)} tensors are bf16")
