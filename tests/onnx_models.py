"""Minimal ONNX models, and ONNX Runtime on them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FP16, FP32, BF16 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16
INT64, INT32, BOOL = TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL
node = helper.make_node
Info = tuple[str, int, list]


def model(
    nodes: list,
    inputs: list[Info],
    outputs: list[Info],
    constants: dict | tuple = (),
    *,
    opset: int = 24,
    domains: tuple[str, ...] = (),
    functions: tuple = (),
) -> onnx.ModelProto:
    """``constants``: name → array or TensorProto."""
    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
        for name, value in dict(constants).items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        tensors,
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)


def raw(name: str, kind: int, dims: list[int], data: bytes) -> TensorProto:
    return helper.make_tensor(name, kind, dims, data, raw=True)


def pack_int4(values: np.ndarray) -> bytes:
    """Two values a byte, the first in the lower half."""
    pairs = (values.astype(np.int8).reshape(-1, 2) & 15).astype(np.uint8)
    return (pairs[:, 0] | pairs[:, 1] << 4).tobytes()


def session(proto: onnx.ModelProto, optimized: Path | None = None):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.qdq_matmulnbits_accuracy_level", "1"
    )  # the reference: no INT8 activations
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(proto: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    """The first output on ONNX Runtime CPU."""
    return session(proto).run(None, feeds)[0]


def optimized_nodes(proto: onnx.ModelProto, folder: Path) -> list[onnx.NodeProto]:
    """The nodes that ONNX Runtime CPU executes after its fusions."""
    session(proto, folder / "optimized.onnx")
    return list(onnx.load(folder / "optimized.onnx").graph.node)


def rules(proto, **options) -> set[str]:
    from llmtrt.graph.lint import lint_model

    return {finding.rule for finding in lint_model(proto, **options)}
