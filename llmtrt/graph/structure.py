"""A package's graph, its weights left on disk, and what of a graph is not the values of weights."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llmtrt import files
from llmtrt.errors import UserError
from llmtrt.graph.lint.subject import dims, external_tensors
from llmtrt.package import Package

_CONSTANT = "constant/"  # what GraphBuilder.constant names after its value; every other initializer is a weight


def load_graph(package: Package) -> ir.Model:
    """The graph of ``package``; UserError where it is not ONNX or a tensor is not in the package's own files."""
    model = read_graph(package.graph)
    for tensor_name, tensor in external_tensors(model):
        name = os.fspath(tensor.location)
        path = files.child(package.path, name)
        if name not in package.manifest["files"]:
            raise UserError(
                f"{package.graph}: tensor {tensor_name!r} lies in {name}, which the manifest does not list: make the "
                "package anew with `llmtrt quantize`"
            )
        if (tensor.offset or 0) + max(tensor.length or 0, tensor.nbytes) > path.stat().st_size:
            raise UserError(
                f"{package.graph}: tensor {tensor_name!r} reaches beyond the end of {name}: make the package anew with "
                "`llmtrt quantize`"
            )
    return model


def read_graph(path: Path) -> ir.Model:
    """The ONNX model in ``path``, its external data left on disk; UserError for a file that is none."""
    try:
        return ir.load(path)
    except Exception as error:  # noqa: BLE001 - protobuf and onnx_ir have no common base class for what a bad file makes them raise
        raise UserError(f"{path} is not a readable ONNX model ({' '.join(str(error).split())})") from None


def weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The initializers that a refit may change, by name: all but those that are named after their value."""
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor for name, tensor in found.items() if not name.startswith(_CONSTANT)}


def structure_digest(model: ir.Model) -> str:
    """SHA-256 of all of ``model`` but the values of its weights: models with the same digest differ in those alone.

    It covers opsets, types and shapes of inputs and outputs, the nodes in their order with attributes and value names,
    names, types and shapes of weights, and constants with their values.
    """
    functions = [
        [*key, _opsets(function.opset_imports), _attributes(function.attributes), _graph(function.graph)]
        for key, function in sorted(model.functions.items())
    ]
    text = json.dumps([_opsets(model.opset_imports), _graph(model.graph), functions], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _opsets(imports: Mapping[str, int]) -> list:
    return sorted(imports.items())


def _graph(graph: ir.Graph) -> list:
    initializers = [
        [name, _tensor(value.const_value, valued=name.startswith(_CONSTANT))]
        for name, value in sorted(graph.initializers.items())
    ]
    return [list(map(_value, graph.inputs)), list(map(_value, graph.outputs)), initializers, list(map(_node, graph))]


def _value(value: ir.Value) -> list:
    return [value.name, str(value.type), dims(value)]


def _node(node: ir.Node) -> list:
    inputs = [None if value is None else value.name for value in node.inputs]
    outputs = [value.name for value in node.outputs]
    return [node.domain, node.op_type, node.overload, inputs, outputs, _attributes(node.attributes)]


def _attributes(attributes: Mapping[str, ir.Attr]) -> list:
    return [
        [name, attribute.type.name, attribute.ref_attr_name, _plain(attribute.value)]
        for name, attribute in sorted(attributes.items())
    ]


def _plain(value: Any) -> Any:
    """An attribute's value as what JSON has; what has no such form is left to its own text."""
    if isinstance(value, ir.Graph):
        return _graph(value)
    if isinstance(value, ir.TensorProtocol):
        return _tensor(value, valued=True)
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def _tensor(tensor: ir.TensorProtocol, valued: bool) -> list:
    said = [tensor.dtype.name, list(tensor.shape.dims)]
    if not valued:
        return said
    content = b"\0".join(tensor.string_data()) if tensor.dtype == ir.DataType.STRING else tensor.tobytes()
    return [*said, hashlib.sha256(content).hexdigest()]
