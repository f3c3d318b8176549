"""The graph contract on graphs that our own writer makes, whole and spoilt."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnx_models import FP16, FP32, model, node, rules, run

from llmtrt.graph.decoder import write_decoder
from llmtrt.graph.lint import lint_model
from llmtrt.graph.lowering import Target, lower
from llmtrt.graph.weights import Int4, Int8, PackedTable, Plain
from llmtrt.models.decoder import Decoder, Layer
from llmtrt.models.rope import Rope

DTYPES = {"float16": ir.DataType.FLOAT16, "float32": ir.DataType.FLOAT, "bfloat16": ir.DataType.BFLOAT16}


class UnreadableWeights:
    """Weights in every quantized form whose data nobody may ask for."""

    head_is_table = False

    def __init__(self, dtype: ir.DataType):
        self.dtype = dtype

    def tensor(self, name, dtype, *shape):
        def refuse():
            raise AssertionError(f"the linter asked for the data of {name}")

        return ir.LazyTensor(refuse, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)

    def linear(self, name, k, n):
        if "lm_head" in name:
            return Int8(self.tensor(f"{name}.q", ir.DataType.INT8, k, n), self.tensor(f"{name}.scale", self.dtype, n))
        if "v_proj" in name:
            return Plain(self.tensor(name, self.dtype, n, k))
        scale = self.tensor(f"{name}.scale", self.dtype, k // 32, n)
        return Int4(
            self.tensor(f"{name}.q", ir.DataType.INT4, k, n), scale, 32, np.arange(k) if "q_proj" in name else None
        )

    def table(self, name, rows, columns):
        q, scale = (
            (name + ".q", ir.DataType.INT32, rows, columns // 4),
            (name + ".scale", self.dtype, rows, columns // 32),
        )
        return PackedTable(self.tensor(*q), self.tensor(*scale), 8)

    def vector(self, name, length, dtype, offset=0.0):
        return self.tensor(name, dtype, length)


class ReadableVectors(UnreadableWeights):
    def vector(self, name, length, dtype, offset=0.0):
        return ir.tensor(np.zeros(length, dtype.numpy()), name=name)


def decoder(dtype="float16", heads=4, kv_heads=2, head_dim=64, weights=UnreadableWeights):
    shape = Decoder(
        family="llama",
        vocab_size=256,
        hidden=1024,
        intermediate=2048,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        activation="silu",
        tied=False,
        max_seq=128,
        attention_scale=0.125,
        layers=(Layer(), Layer(window=16)),
        ropes=(Rope(np.ones(head_dim // 2, np.float32)),),
        qk_norm=True,
        qkv_bias=True,
    )
    return write_decoder(shape, weights(DTYPES[dtype]), dtype)


def test_a_package_graph_is_clean_and_its_weights_stay_unread():
    graph = decoder()
    assert lint_model(graph) == []
    assert [value.name for value in graph.graph.inputs][:2] == ["input_ids", "positions"]  # untouched


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"dtype": "float32"}, "attention-no-dedicated-kernel"),
        ({"head_dim": 8}, "attention-no-dedicated-kernel"),
        ({"dtype": "bfloat16"}, "bf16-onnxruntime"),
        ({"heads": 2}, "attention-no-dedicated-kernel"),
    ],
)
def test_a_package_graph_that_build_lowers_gets_warnings_alone(options, rule):
    findings = lint_model(decoder(**options))
    assert {finding.rule for finding in findings} == {rule}
    assert {finding.severity for finding in findings} == {"warning"}


def test_a_lowered_graph_is_clean():
    target = Target(flavor="rtx", capabilities=frozenset(), capacity=128)
    package = decoder("float32", weights=ReadableVectors)
    assert {(finding.rule, finding.severity) for finding in lint_model(package, lowered=True)} == {
        ("attention-no-dedicated-kernel", "error"),
        ("cache-capacity", "error"),
    }
    assert lint_model(lower(package, target)[0], lowered=True) == []


def put(value, dtype=None, shape=None):
    if dtype is not None:
        value.type = ir.TensorType(dtype)
    if shape is not None:
        value.shape = ir.Shape(shape)


def inputs(graph):
    return {value.name: value for value in graph.graph.inputs}


def outputs(graph):
    return {value.name: value for value in graph.graph.outputs}


SPOILS = {
    "int32 ids": (lambda g: put(inputs(g)["input_ids"], ir.DataType.INT32), "contract-inputs"),
    "flat ids": (lambda g: put(inputs(g)["input_ids"], shape=["S"]), "contract-inputs"),
    "positions of another length": (lambda g: put(inputs(g)["positions"], shape=["B", "T"]), "contract-inputs"),
    "renamed positions": (lambda g: setattr(inputs(g)["positions"], "name", "position_ids"), "contract-inputs"),
    "no logits_index": (lambda g: setattr(inputs(g)["logits_index"], "name", "last"), "contract-inputs"),
    "kv_range of rank 2": (lambda g: put(inputs(g)["kv_range"], shape=["B", "L"]), "contract-inputs"),
    "half logits": (lambda g: put(outputs(g)["logits"], ir.DataType.FLOAT16), "contract-logits"),
    "flat logits": (lambda g: put(outputs(g)["logits"], shape=["B", 256]), "contract-logits"),
    "renamed logits": (lambda g: setattr(outputs(g)["logits"], "name", "scores"), "contract-logits"),
    "a present of another size": (
        lambda g: put(outputs(g)["present_key_1"], shape=["B", 2, "rows", 64]),
        "contract-cache-pairs",
    ),
    "a present in fp32": (lambda g: put(outputs(g)["present_key_1"], ir.DataType.FLOAT), "contract-cache-pairs"),
    "a renamed present": (
        lambda g: setattr(outputs(g)["present_key_1"], "name", "present_k_1"),
        "contract-cache-pairs",
    ),
    "a lone present": (lambda g: setattr(inputs(g)["past_key_1"], "name", "cache"), "contract-cache-pairs"),
    "a gap": (lambda g: setattr(inputs(g)["past_key_1"], "name", "past_key_7"), "contract-cache-pairs"),
    "flat past": (lambda g: put(inputs(g)["past_value_0"], shape=["B", "capacity", 128]), "contract-cache-pairs"),
    "opset": (lambda g: g.opset_imports.update({"": 23}), "opset-version"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_spoilt_contracts(name):
    spoil, rule = SPOILS[name]
    graph = decoder()
    spoil(graph)
    found = {finding.rule for finding in lint_model(graph) if finding.severity == "error"}
    assert rule in found


def test_logits_in_half_lose_the_order_of_candidates():
    def head(cast):
        nodes = [node("Identity" if not cast else "Cast", ["logits"], ["y"], **({"to": FP16} if cast else {}))]
        return model(nodes, [("logits", FP32, [1, 1, 2])], [("y", FP16 if cast else FP32, [1, 1, 2])])

    close = np.array([[[20.001, 20.003]]], np.float32)
    assert run(head(False), logits=close).argmax() == 1
    assert run(head(True), logits=close).argmax() == 0


def test_other_models_need_not_keep_the_contract():
    other = model([node("Relu", ["pixels"], ["y"])], [("pixels", FP32, [1, 3])], [("y", FP32, [1, 3])])
    assert rules(other) == set()


def test_many_layers_at_once():
    """A proto, too: 60 attention nodes, one causal trap among them, found by its name."""
    shape, nodes = [1, 4, 2, 64], []
    for i in range(60):
        causal = {"is_causal": 1} if i == 41 else {}
        nodes.append(node("Attention", [f"x{i}", "k", "k"], [f"x{i + 1}"], name=f"layer.{i}", **causal))
    proto = model(nodes, [("x0", FP16, shape), ("k", FP16, [1, 2, 8, 64])], [("x60", FP16, shape)])
    before = proto.SerializeToString()
    (finding,) = lint_model(proto)
    assert (finding.node, finding.operator, finding.rule) == ("layer.41", "Attention", "attention-causal-alignment")
    assert finding.message and finding.advice
    assert proto.SerializeToString() == before


def test_bf16_constants_count_once():
    weight = onnx.helper.make_tensor("w", TensorProto.BFLOAT16, [2], np.ones(2, ml_dtypes.bfloat16).tobytes(), raw=True)
    proto = model([node("Cast", ["w"], ["y"], to=FP32)], [], [("y", FP32, [2])], {"w": weight})
    assert rules(proto) == {"bf16-onnxruntime"}
