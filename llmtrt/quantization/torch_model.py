"""The checkpoint's decoder on torch, with the weights of one layer in memory: the canonical graph, computed in fp32."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from torch import Tensor

from llmtrt.checkpoints.checkpoint import Checkpoint
from llmtrt.graph.decoder import write_decoder
from llmtrt.models.decoder import Decoder
from llmtrt.quantization.torch_graph import TorchGraph, Values, live
from llmtrt.quantization.torch_weights import TorchWeights


@dataclass
class Stage:
    """A stretch of a layer's nodes. After it come ``products``, weight → the value that its product is, which all read the
    value ``read`` ([B, S, K]), but for the layer's last stage, which has none. ``residual``: the value ([B, S, H]) that the
    product is added to, where it is added to the residual stream as it is."""

    nodes: list[ir.Node] = field(default_factory=list)
    products: dict[str, str] = field(default_factory=dict)
    read: str = ""
    residual: str = ""

    @property
    def weights(self) -> list[str]:
        return list(self.products)


@dataclass(frozen=True)
class Layer:
    """``input``, ``output``: names of the hidden states before and after it."""

    stages: list[Stage]
    input: str
    output: str


class LayerwiseModel:
    """Values go by name, as in ``TorchGraph``. ``enter`` reads the weights of a layer and drops all others."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, device: str = "cpu"):
        self.device = device
        self._weights, self._loaded = TorchWeights(checkpoint, decoder.tied), {}
        self._graph = TorchGraph(write_decoder(decoder, self._weights, "float32"), len(decoder.layers), device)
        outputs = [_output(nodes) for nodes in [self._graph.before, *self._graph.layers]]
        self.layers = [
            Layer(self._stages(nodes), before, after)
            for nodes, before, after in zip(self._graph.layers, outputs, outputs[1:])
        ]

    def start(self, ids: Tensor) -> Values:
        """What the layers read: hidden states, fp32 [B, S, H], of ``ids`` [B, S], under the first layer's ``input``, and
        what all of them share (masks, rotary angles)."""
        self._enter(self._graph.before)
        values = self.run(self._graph.before, self._graph.inputs(ids.to(self.device)))
        return keep(values, set().union(*map(live, self._graph.layers)))

    def enter(self, layer: Layer) -> None:
        self._enter([node for stage in layer.stages for node in stage.nodes])

    def finish(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits, fp32 [B, S, V], of the hidden states [B, S, H] after the last layer."""
        self._enter(self._graph.after)
        values = self._graph.inputs(ids.to(self.device)) | {self.layers[-1].output: hidden}
        return self.run(self._graph.after, values)["logits"]

    def hidden(self, ids: Tensor, others: Callable[[Layer], Mapping[str, Tensor]] = lambda layer: {}) -> Tensor:
        """Hidden states, fp32 [B, S, H], of ``ids`` [B, S] after the last layer, with ``others(layer)`` in the place of a
        layer's weights of those names."""
        values = self.start(ids)
        for layer in self.layers:
            self.enter(layer)
            replaced = others(layer)
            for stage in layer.stages:
                values = self.run(stage.nodes, values, replaced)
        return values[self.layers[-1].output]

    def weight(self, name: str) -> Tensor:
        """A weight of the layer that was entered, fp32 [N, K]."""
        return self._loaded[name]

    def run(self, nodes: Sequence[ir.Node], values: Values, others: Mapping[str, Tensor] = {}) -> Values:  # noqa: B006
        """``values`` and what ``nodes`` compute, with ``others`` in the place of weights of those names."""
        return self._graph.run(nodes, values, lambda name: others[name] if name in others else self._loaded[name])

    def _stages(self, nodes: Sequence[ir.Node]) -> list[Stage]:
        stages = [Stage()]
        for node in nodes:
            if node.op_type in ("MatMul", "Gemm") and node.inputs[1].name in self._weights:
                read = _source(node.inputs[0]).name
                if len(stages) == 1 or stages[-2].read != read:
                    stages[-1].read, stages[-1].residual = read, _residual(node.outputs[0])
                    stages.append(Stage())
                stages[-2].products[node.inputs[1].name] = node.outputs[0].name
            stages[-1].nodes.append(node)
        return stages

    def _enter(self, nodes: Sequence[ir.Node]) -> None:
        names = self._graph.weights_of(nodes)
        for name in self._loaded.keys() - names:
            del self._loaded[name]
        for name in sorted(names - self._loaded.keys()):
            self._loaded[name] = self._weights.read(name).to(self.device)


def keep(values: Values, names: set[str]) -> Values:
    return {name: value for name, value in values.items() if name in names}


def _output(nodes: Sequence[ir.Node]) -> str:
    """The hidden states, which the last node of the embedding and of each layer computes."""
    return nodes[-1].outputs[0].name


def _source(value: ir.Value) -> ir.Value:
    """What was reshaped to ``value``."""
    while value.producer() is not None and value.producer().op_type == "Reshape":
        value = value.producer().inputs[0]
    return value


def _residual(product: ir.Value) -> str:
    """The name of what ``product``, reshaped or with a bias, is added to; empty where something else becomes of it."""
    while len(uses := list(product.uses())) == 1:
        node, index = uses[0].node, uses[0].idx
        if node.op_type == "Add":
            other = node.inputs[1 - index]
            if other.producer() is not None:
                return other.name
        elif node.op_type not in ("Reshape", "Cast"):
            break
        product = node.outputs[0]
    return ""
