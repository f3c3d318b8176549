"""A thin hand for writing onnx_ir graphs: every node and value named after the module it belongs to."""

from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

OPSET = 24
IR_VERSION = 12

DTYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16, "float32": ir.DataType.FLOAT}


class GraphBuilder:
    """Collects inputs, initializers and nodes; ``model()`` makes them an ir.Model of the opset of the contract."""

    def __init__(self, name: str):
        self._name, self._path = name, []
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._outputs: list[ir.Value] = []
        self._counts: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str):
        """Within the block, nodes are named ``name/…``; scopes nest with a dot, as modules do in a checkpoint."""
        self._path.append(name)
        yield
        self._path.pop()

    def input(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value = ir.val(name, dtype, shape)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: list[int | str]) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A weight or constant under the tensor's own name; asking again for the same name gives the same value."""
        if tensor.name not in self._initializers:
            self._initializers[tensor.name] = ir.val(tensor.name, tensor.dtype, tensor.shape, const_value=tensor)
        return self._initializers[tensor.name]

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant shared by all who ask for the same value and type."""
        array = np.asarray(value, dtype)
        said = "_".join(map(str, array.flatten()))
        name = f"constant/{array.dtype}{list(array.shape)}_{said}".replace(" ", "")
        return self.initializer(ir.tensor(array, name=name))

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Adds a node of the standard domain with one output and returns that."""
        base = ".".join(self._path) + f"/{kind}"
        self._counts[base] = count = self._counts.get(base, 0) + 1
        name = base if count == 1 else f"{base}_{count}"
        node = ir.node(kind, list(inputs), attributes, name=name)
        node.outputs[0].name = name
        self._nodes.append(node)
        return node.outputs[0]

    def cast(self, value: ir.Value, source: ir.DataType, target: ir.DataType) -> ir.Value:
        """``value`` as ``target``, itself where it has that type already."""
        return value if source == target else self.op("Cast", value, to=int(target))

    def model(self) -> ir.Model:
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET},
            name=self._name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="llmtrt")
