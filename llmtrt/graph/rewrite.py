"""What lowerings write in a node's place."""

import numpy as np
import onnx_ir as ir

WRITTEN_OUT = "written_out_"  # names of outputs that nobody reads begin so


class Rewrite:
    """Collects the nodes that are to stand for ``node``; they and their values are named after it."""

    def __init__(self, node: ir.Node):
        self._node, self._tape, self._count = node, ir.tape.Tape(), 0

    def op(self, kind: str, *inputs: ir.Value, **attributes) -> ir.Value:
        """Adds a node of the standard domain with one output and returns that."""
        self._count += 1
        value = self._tape.op(kind, list(inputs), attributes, name=f"{self._node.name}/{self._count}_{kind}")
        value.name = f"{self._node.outputs[0].name}/{self._count}_{kind}"
        return value

    def constant(self, array: np.ndarray) -> ir.Value:
        return self.op("Constant", value=ir.tensor(array))

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float, dtype: ir.DataType) -> ir.Value:
        return self.constant(np.array(value, dtype.numpy()))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", value, to=int(dtype))

    def shaped(self, value: ir.Value, *sizes: ir.Value | int, **attributes: int) -> ir.Value:
        """``value`` reshaped; ``sizes`` are sizes or, from the graph, int64 [1]."""
        parts = [self.ints(size) if isinstance(size, int) else size for size in sizes]
        return self.op("Reshape", value, self.op("Concat", *parts, axis=0), **attributes)

    def write_out(self, value: ir.Value, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        """``value``, which becomes an output of the graph, so that TensorRT computes it once, in a kernel that ends with it:
        what it does not have to write out it computes anew for each row of a matrix that it multiplies with. It has to
        have one dimension: TensorRT-RTX 1.6 writes others out beside, and computes them anew all the same."""
        outputs = self._node.graph.outputs
        value.name, value.shape, value.type = f"{WRITTEN_OUT}{len(outputs)}", ir.Shape(shape), ir.TensorType(dtype)
        outputs.append(value)
        return value

    def replace(self, value: ir.Value) -> None:
        """Puts all that was added in the node's place, ``value`` for its one output."""
        node = self._node
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], self._tape.nodes, node.outputs, [value])

    def insert(self) -> None:
        """Puts all that was added before the node, which stays."""
        self._node.graph.insert_before(self._node, self._tape.nodes)
