"""Weights as inputs of the network: the plan has none, and whoever runs it says where they lie in GPU memory.

So one copy of them, as the package's file has it, serves every plan that takes them, and building needs no GPU.
"""

import onnx_ir as ir

from llmtrt.graph.lowering import Lowering, Target


def weight_inputs(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    """The initializers of ``model`` that become inputs, by name: the matrices in the package's files; vectors are small."""
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {
        name: tensor
        for name, tensor in found.items()
        if isinstance(tensor, ir.ExternalTensor) and len(tensor.shape) > 1
    }


def _applies(model: ir.Model, target: Target) -> bool:
    return target.weights == "inputs"


def _apply(model: ir.Model, target: Target) -> ir.Model:
    for name, tensor in weight_inputs(model).items():
        value = model.graph.initializers.pop(name)
        value.const_value, value.type, value.shape = None, ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.dims)
        model.graph.inputs.append(value)
    return model


LOWERING = Lowering("weights_as_inputs", _applies, _apply)
