"""What TensorRT-RTX makes of a model, on a machine without a GPU: the parsed network, or the plan, or why not."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import onnx
import pytest

from llmtrt.engine.flavor import Flavor, choose
from llmtrt.engine.logger import make_logger
from llmtrt.engine.parse import parse_errors
from llmtrt.errors import UserError

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # input → least, best, most shape


@dataclass
class Layer:
    kind: str
    name: str
    inputs: list[str | None]
    handle: Any


@dataclass
class Parsed:
    """``errors`` is empty where the parser took the model; the other fields then hold the network."""

    errors: str
    network: Any
    owners: tuple

    @property
    def layers(self) -> list[Layer]:
        layers = map(self.network.get_layer, range(self.network.num_layers))
        return [Layer(layer.type.name, layer.name, _inputs(layer), layer) for layer in layers]

    def readers(self, tensor: str) -> list[Layer]:
        """The layers that read ``tensor``, looking through Casts of it."""
        found = []
        for layer in self.layers:
            if tensor in layer.inputs:
                found += self.readers(layer.handle.get_output(0).name) if layer.kind == "CAST" else [layer]
        return found


def _inputs(layer: Any) -> list[str | None]:
    tensors = map(layer.get_input, range(layer.num_inputs))
    return [None if tensor is None else tensor.name for tensor in tensors]


@functools.cache
def rtx() -> tuple[Flavor, Any]:
    """The flavor and one logger for all builders; the test is skipped where TensorRT-RTX is absent."""
    try:
        flavor = choose("rtx", "builds_without_gpu")
    except UserError as error:
        pytest.skip(f"no TensorRT-RTX: {error}")
    return flavor, make_logger(flavor)


def parse(model: onnx.ModelProto) -> Parsed:
    flavor, logger = rtx()
    builder = flavor.module.Builder(logger)
    flags = flavor.module.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = flavor.module.OnnxParser(network, logger)
    accepted = parser.parse(model.SerializeToString())
    errors = "" if accepted else "; ".join(map(str, parse_errors(parser))) or "no reason given"
    return Parsed(errors, network, (builder, parser))


def build(model: onnx.ModelProto, *profiles: Profile) -> tuple[bytes | None, str]:
    """(plan for compute capability 8.9, "") or (None, reason)."""
    flavor, logger = rtx()
    parsed = parse(model)
    if parsed.errors:
        return None, parsed.errors
    builder = parsed.owners[0]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(flavor.module.ComputeCapability.SM89, 0)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, least, best, most)
        config.add_optimization_profile(profile)
    logger.clear()
    with contextlib.suppress(Exception):
        plan = builder.build_serialized_network(parsed.network, config)
        if plan is not None:
            return bytes(plan), ""
    return None, logger.reason() or "no reason given"


def attention_handle(parsed: Parsed) -> Any:
    """The IAttention of the only attention in the network."""
    (layer,) = [layer for layer in parsed.layers if layer.kind == "ATTENTION_INPUT"]
    layer.handle.__class__ = rtx()[0].module.IAttentionInputLayer
    return layer.handle.attention
