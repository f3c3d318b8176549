"""Single operators: what ONNX Runtime may run and TensorRT does not."""

import numpy as np
import onnx
import pytest
import trt_probe
from onnx import helper
from onnx_models import FP16, FP32, INT32, INT64, model, node, rules, run, session

MICROSOFT = "com.microsoft"


def quantized_product(kind):
    scales = np.ones(64, np.float16 if kind == FP16 else np.float32)
    return model(
        [node("MatMulNBits", ["x", "q", "s"], ["y"], domain=MICROSOFT, K=64, N=32, bits=4, block_size=32)],
        [("x", kind, [1, 64])],
        [("y", kind, [1, 32])],
        {"q": np.full((32, 2, 16), 0x99, np.uint8), "s": scales},
        domains=(MICROSOFT,),
    )


def grouped_query_attention():
    cache = [1, 2, 16, 64]
    inputs = [
        ("q", FP16, [1, 1, 256]),
        ("k", FP16, [1, 1, 128]),
        ("v", FP16, [1, 1, 128]),
        ("past_k", FP16, cache),
        ("past_v", FP16, cache),
        ("lengths", INT32, [1]),
        ("total", INT32, []),
    ]
    names = [name for name, *_ in inputs]
    outputs = [("y", FP16, [1, 1, 256]), ("present_k", FP16, cache), ("present_v", FP16, cache)]
    nodes = [
        node(
            "GroupQueryAttention",
            names,
            [name for name, *_ in outputs],
            domain=MICROSOFT,
            num_heads=4,
            kv_num_heads=2,
            scale=0.125,
        )
    ]
    return model(nodes, inputs, outputs, domains=(MICROSOFT,))


def unknown_operator():
    return model(
        [node("Mish2", ["x"], ["y"], domain="my.ops")], [("x", FP16, [4])], [("y", FP16, [4])], domains=("my.ops",)
    )


def test_microsoft_operators_want_a_plugin():
    np.testing.assert_allclose(
        run(quantized_product(FP32), x=np.ones((1, 64), np.float32)), 64.0
    )  # ONNX Runtime runs it
    assert "failed to load MatMulNBits plugin" in trt_probe.parse(quantized_product(FP16)).errors
    assert "custom-domain" in rules(quantized_product(FP16))
    assert "failed to load GroupQueryAttention plugin" in trt_probe.parse(grouped_query_attention()).errors
    assert "custom-domain" in rules(grouped_query_attention())
    assert "not supported" in trt_probe.parse(unknown_operator()).errors
    assert rules(unknown_operator()) == {"custom-domain"}


def local_function(body):
    function = helper.make_function("my.ops", "Mine", ["x"], ["y"], body, [helper.make_opsetid("", 24)])
    return model(
        [node("Mine", ["a"], ["b"], domain="my.ops")],
        [("a", FP16, [2, 4])],
        [("b", FP16, [2, 4])],
        domains=("my.ops",),
        functions=(function,),
    )


def test_local_functions_of_standard_operators_are_clean_and_are_looked_into():
    fine = local_function([node("Abs", ["x"], ["y"])])
    assert trt_probe.build(fine)[0]
    assert rules(fine) == set()
    constants = {"index": [0, 0], "shape": [2, 1], "from": [0, 0], "to": [2, 1]}
    inner = [node("Constant", [], [name], value_ints=values) for name, values in constants.items()]
    inner += [
        node("Reshape", ["index", "shape"], ["i"]),
        node("Slice", ["x", "from", "to"], ["u"]),
        node("ScatterElements", ["x", "i", "u"], ["y"], axis=1, reduction="add"),
    ]
    trap = local_function(inner)
    assert "Unsupported reduction" in trt_probe.parse(trap).errors
    assert "scatter-reduction" in rules(trap)


def test_a_function_that_calls_itself_is_a_finding():
    endless = local_function([node("Mine", ["x"], ["y"], domain="my.ops")])
    assert "onnx-checker" in rules(endless)


def test_trt_operators_do_not_load_on_onnx_runtime():
    shape = [2, 4, 4, 64]
    trap = model(
        [node("TRT_Attention", ["q", "k", "v"], ["y"], domain="trt")],
        [(name, FP16, shape) for name in "qkv"],
        [("y", FP16, shape)],
        domains=("trt",),
    )
    with pytest.raises(Exception, match="TRT_Attention"):
        session(trap)
    assert trt_probe.build(trap)[0]
    assert rules(trap) == {"trt-operator"}
    assert rules(trap, lowered=True) == set()


VALUES = {"values": np.array([0, 1], np.float32)}


def one_hot(depth_nodes, constants, extra=(), width="W"):
    return model(
        [*depth_nodes, node("OneHot", ["i", "depth", "values"], ["y"], name="one_hot")],
        [("i", INT64, ["N"]), *extra],
        [("y", FP32, ["N", width])],
        VALUES | constants,
    )


def profile(**shapes):
    return {name: (least, most, most) for name, (least, most) in shapes.items()}


def test_one_hot_of_a_computed_depth():
    highest = [node("ReduceMax", ["i"], ["m"], keepdims=0), node("Add", ["m", "one"], ["depth"])]
    trap = one_hot(highest, {"one": np.array(1)})
    i = np.array([0, 2, 1])
    np.testing.assert_array_equal(run(trap, i=i), np.eye(3)[i])  # ONNX Runtime runs it
    plan, reason = trt_probe.build(trap, profile(i=((4,), (4,))))
    assert plan is None and "build time constant" in reason
    assert rules(trap) == {"onehot-depth"}

    fixed = model(
        [
            node("Unsqueeze", ["i", "last"], ["column"]),
            node("Equal", ["column", "range"], ["same"]),
            node("Cast", ["same"], ["y"], to=FP32),
        ],
        [("i", INT64, ["N"]), ("range", INT64, ["L"])],
        [("y", FP32, ["N", "L"])],
        {"last": np.array([1])},
    )
    np.testing.assert_array_equal(run(fixed, i=i, range=np.arange(3)), np.eye(3)[i])
    assert trt_probe.build(fixed, profile(i=((1,), (4,)), range=((1,), (8,))))[0]
    assert rules(fixed) == set()


def test_one_hot_of_a_dimension_that_varies():
    trap = one_hot([node("Shape", ["x"], ["depth"], start=1)], {}, [("x", FP32, [1, "W"])])
    plan, reason = trt_probe.build(trap, profile(i=((4,), (4,)), x=((1, 8), (1, 16))))
    assert plan is None and "build time constant" in reason
    assert rules(trap) == {"onehot-depth"}


@pytest.mark.parametrize(
    ("nodes", "constants", "extra"),
    [
        ([], {"depth": np.array(16)}, ()),
        ([node("Cast", ["sixteen"], ["depth"], to=INT32)], {"sixteen": np.array([16])}, ()),
        ([node("Shape", ["x"], ["depth"], start=1)], {}, [("x", FP32, ["B", 16])]),
    ],
)
def test_one_hot_of_a_fixed_depth_is_clean(nodes, constants, extra):
    fixed = one_hot(nodes, constants, extra, 16)
    shapes = {"x": ((1, 16), (4, 16))} if extra else {}
    assert trt_probe.build(fixed, profile(i=((1,), (4,)), **shapes))[0]
    assert rules(fixed) == set()


def scatter(operator, reduction):
    shape, index = ([1, 80], [1, 4]) if operator == "ScatterElements" else ([80], [4, 1])
    update = [1, 4] if operator == "ScatterElements" else [4]
    axis = {"axis": 1} if operator == "ScatterElements" else {}
    return model(
        [node(operator, ["x", "i", "u"], ["y"], reduction=reduction, **axis)],
        [("x", FP32, shape), ("i", INT64, index), ("u", FP32, update)],
        [("y", FP32, shape)],
    )


@pytest.mark.parametrize("operator", ["ScatterElements", "ScatterND"])
def test_scatter_with_a_reduction(operator):
    for reduction in ("add", "mul", "max"):
        onnx.checker.check_model(scatter(operator, reduction), full_check=True)
        assert "reduction" in trt_probe.parse(scatter(operator, reduction)).errors
        assert rules(scatter(operator, reduction)) == {"scatter-reduction"}
    assert trt_probe.build(scatter(operator, "none"))[0]
    assert rules(scatter(operator, "none")) == set()


def test_top_k_beyond_3840():
    def top(k):
        return model(
            [node("TopK", ["x", "k"], ["v", "i"])],
            [("x", FP32, [1, 8000])],
            [("v", FP32, [1, k]), ("i", INT64, [1, k])],
            {"k": np.array([k])},
        )

    plan, reason = trt_probe.build(top(3841))
    assert plan is None and "3840" in reason
    assert rules(top(3841)) == {"topk-limit"}
    assert trt_probe.build(top(3840))[0]
    assert rules(top(3840)) == set()
