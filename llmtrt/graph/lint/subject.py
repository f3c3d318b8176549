"""The graph under the linter: local functions inlined, types and shapes inferred, weights left where they are."""

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

STANDARD = ("", "ai.onnx")
_SMALL_BYTES = 1024  # a tensor that shape inference may want the values of
_READ_BYTES = 64 << 20  # the largest tensor whose values a rule looks at
_MESSAGE = 400

Dim = int | str | None
Problem = tuple[ir.Node | str, str]


class Subject:
    """``model`` gets every shape that ONNX can infer; ``problems`` are what onnx.checker says of it.

    ``base_dir`` is the folder of the external data, None where there is none; ``lowered`` says that the graph is what
    TensorRT is to parse rather than a package's, whose KV capacity is still open. ``known`` are problems (a node, or an
    empty string, and a text) that keep ONNX from inferring anything; without them, ``model`` itself is changed.
    """

    def __init__(self, model: ir.Model, base_dir: Path | None, lowered: bool = False, known: Sequence[Problem] = ()):
        self.model, self.base_dir, self.lowered = model, base_dir, lowered
        self.problems: list[Problem] = list(known)
        if not known:
            self._guard(self._infer)
        self.graphs = [self.model.graph, *self.model.graph.subgraphs()]
        self._by_operator: dict[str, list[ir.Node]] = defaultdict(list)
        self.all_nodes = list(self.model.graph.all_nodes())
        for node in self.all_nodes:
            self._by_operator[node.op_type].append(node)

    def nodes(self, *operators: str, domains: tuple[str, ...] = STANDARD) -> Iterator[ir.Node]:
        """Nodes of these operators, in subgraphs too."""
        for operator in operators:
            yield from (node for node in self._by_operator.get(operator, ()) if node.domain in domains)

    def constants(self) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
        """Every initializer and every output of a Constant that holds a tensor."""
        for graph in self.graphs:
            for value in graph.initializers.values():
                if value.const_value is not None:
                    yield value, value.const_value
        for node in self.nodes("Constant"):
            if (tensor := ir.convenience.get_const_tensor(node.outputs[0])) is not None:
                yield node.outputs[0], tensor

    def values(self, value: ir.Value | None) -> np.ndarray | None:
        """The numbers of a constant that is not too large to look at and whose data are here, else None."""
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        if tensor is None or tensor.nbytes > _READ_BYTES or not self.is_readable(tensor):
            return None
        return tensor.numpy()

    def is_fixed(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is the same at every run: made of constants and static shapes alone."""
        pending, seen = [value], set()
        while pending:
            value = pending.pop()
            if value is None or id(value) in seen or ir.convenience.get_const_tensor(value) is not None:
                continue
            seen.add(id(value))
            node = value.producer()
            if node is None or any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
                return False
            if node.op_type in ("Shape", "Size"):
                if not _asks_static(node):
                    return False
                continue
            pending += node.inputs
        return True

    def is_readable(self, tensor: ir.TensorProtocol) -> bool:
        """Whether a tensor's data are in the model or in a file inside the model's folder."""
        if not isinstance(tensor, ir.ExternalTensor):
            return True
        path = self.external_path(tensor)
        return path is not None and path.is_file() and path.stat().st_size >= (tensor.offset or 0) + tensor.nbytes

    def external_path(self, tensor: ir.ExternalTensor) -> Path | None:
        """Where an external tensor lies, None if that is outside of the model's folder."""
        if isinstance(tensor.location, bytes):  # protobuf's way to say that it is not UTF-8
            return None
        location = Path(tensor.location)
        if location.is_absolute() or ".." in location.parts or "\\" in str(location) or "\0" in str(location):
            return None
        if self.base_dir is None:
            return location
        path = self.base_dir / location
        return path if path.resolve().is_relative_to(self.base_dir.resolve()) else None

    def _guard(self, action) -> None:
        """Runs a step of ONNX's own, whose exceptions have no common class, and keeps what it complains of."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - ValidationError, InferenceError, EncodeError …
            problem = "", " ".join(str(error).split())[:_MESSAGE].rstrip(". ") or type(error).__name__
            if problem not in self.problems:
                self.problems.append(problem)

    def _skeleton(self) -> onnx.ModelProto:
        """The model with big and external weights turned into inputs, so that ONNX's checks neither copy nor open them."""
        model = self.model.clone()
        inputs = {value.name for value in model.graph.inputs}
        for graph in [model.graph, *model.graph.subgraphs()]:
            for name, value in list(graph.initializers.items()):
                tensor = value.const_value
                if tensor is None:
                    continue
                is_lazy = isinstance(tensor, ir.LazyTensor)  # a weight, and work to make
                if tensor.nbytes <= _SMALL_BYTES and not is_lazy and self.is_readable(tensor):
                    if isinstance(tensor, ir.ExternalTensor):
                        value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)
                    continue
                value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.dims)
                graph.initializers.pop(name)
                if name not in inputs:
                    inputs.add(name)
                    model.graph.inputs.append(value)
        return ir.to_proto(model)

    def _infer(self) -> None:
        skeleton = self._skeleton()
        self._guard(lambda: onnx.checker.check_model(skeleton, full_check=True))
        if self.model.functions:
            InlinePass()(self.model)
            skeleton = self._skeleton()
        inferred = onnx.shape_inference.infer_shapes(skeleton, strict_mode=False, data_prop=True)
        known = {info.name: info for graph in _graphs(inferred.graph) for info in graph.value_info}
        for node in self.model.graph.all_nodes():
            for value in node.outputs:
                info = known.get(value.name)
                if info is None or value.shape is not None and value.type is not None:
                    continue
                found = ir.from_proto(info)
                value.type = value.type or found.type
                value.shape = value.shape if value.shape is not None else found.shape


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def gaps(model: ir.Model) -> Iterator[Problem]:
    """Nodes that read, and graphs that return, what nothing before them wrote: onnx_ir loads such a model, but it can
    neither clone nor check it."""
    for graph in _main_graphs(model):
        yield from _gaps(graph, frozenset())


def _gaps(graph: ir.Graph, outer: Set[ir.Value]) -> Iterator[Problem]:
    written = {*outer, *graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in written:
                yield node, f"its input {value.name!r} is no input of the graph, no weight and no earlier node's output"
        for attribute in node.attributes.values():
            for inner in _subgraphs(attribute):
                yield from _gaps(inner, written)
        written.update(node.outputs)
    for value in graph.outputs:
        if value not in written:
            yield "", f"no node writes the output {value.name!r}"


def external_tensors(model: ir.Model) -> Iterator[tuple[str, ir.ExternalTensor]]:
    """Every tensor whose data are in another file, with a name: weights and attributes of the graph, of subgraphs and of
    local functions."""
    for main in _main_graphs(model):
        for graph in (main, *main.subgraphs()):
            for name, value in graph.initializers.items():
                if isinstance(value.const_value, ir.ExternalTensor):
                    yield name, value.const_value
        for node in main.all_nodes():
            for attribute in node.attributes.values():
                for tensor in _tensors(attribute):
                    if isinstance(tensor, ir.ExternalTensor):
                        yield node.outputs[0].name or node.name or node.op_type, tensor


def _main_graphs(model: ir.Model) -> list[ir.Graph]:
    return [model.graph, *(function.graph for function in model.functions.values())]


def _subgraphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.is_ref() or attribute.type not in _GRAPHS:
        return ()
    return (attribute.value,) if attribute.type == ir.AttributeType.GRAPH else attribute.value


def _tensors(attribute: ir.Attr) -> Sequence[ir.TensorProtocol]:
    if attribute.is_ref() or attribute.type not in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        return ()
    return (attribute.value,) if attribute.type == ir.AttributeType.TENSOR else attribute.value


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _asks_static(node: ir.Node) -> bool:
    """Whether the Shape or Size ``node`` asks for static dimensions alone."""
    shape = dims(node.inputs[0])
    if shape is None:
        return False
    start, end = attribute(node, "start", 0), attribute(node, "end", None)
    asked = shape[start:end] if node.op_type == "Shape" else shape
    return all(isinstance(dim, int) for dim in asked)


def attribute(node: ir.Node, name: str, default):
    """The value of an attribute, ``default`` where the node does not have it."""
    found = node.attributes.get(name)
    return default if found is None or found.is_ref() else found.value


def tensor_input(node: ir.Node, index: int) -> ir.Value | None:
    """Input ``index``, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def dims(value: ir.Value | None) -> tuple[Dim, ...] | None:
    """An int a dimension, its name where it is symbolic, None where nothing is known; None for an unknown rank."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def dtype(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype
