"""The KV cache: TensorScatter forms that TensorRT does not take, or takes apart from what was meant."""

import numpy as np
import onnx
import pytest
import trt_probe
from onnx_models import BF16, FP16, FP32, INT64, model, node, raw, rules, session

from llmtrt.graph.lint import lint_model

INT8, FP8 = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN


def cache(
    kind=FP16, capacity=16, before=None, after=None, is_output=True, shape=None, new=None, read=None, **attributes
):
    """present = TensorScatter(past, new, at); ``before`` and ``after`` are operators put around it."""
    shape, new = shape or [1, 2, capacity, 8], new or [1, 2, 1, 8]
    past, present = "past" if before is None else "moved", "present" if after is None else "scattered"
    nodes = [] if before is None else [node(before, ["past"], ["moved"], name="before")]
    nodes.append(node("TensorScatter", [past, "new", "at"], [present], name="write", **attributes))
    if after is not None:
        nodes.append(node(after, ["scattered"], ["present"], name="after"))
    nodes += read or [node("Identity", [present], ["y"], name="read")]
    outputs = [("y", kind, shape), *([("present", kind, shape)] if is_output else [])]
    return model(nodes, [("past", kind, shape), ("new", kind, new), ("at", INT64, [1])], outputs)


@pytest.mark.parametrize("kind", [FP16, FP32, BF16])
def test_linear_cache_is_clean_and_builds(kind):
    assert trt_probe.build(cache(kind))[0]
    assert trt_probe.build(cache(kind, axis=2))[0]
    assert rules(cache(kind)) | rules(cache(kind, axis=2)) <= {"bf16-onnxruntime"}


@pytest.mark.parametrize(
    ("trap", "reason", "rule"),
    [
        (cache(mode="circular"), "linear", "cache-circular"),
        (cache(shape=[1, 16, 2, 8], new=[1, 1, 2, 8], axis=1), "axis", "cache-axis"),
        (cache(INT8), "must have type Float, Half, or BFloat16", "cache-type"),
        (cache(FP8), "must have type Float, Half, or BFloat16", "cache-type"),
        (cache(before="Identity"), "must be a network input", "cache-past-not-input"),
        (cache(before="Abs"), "must be a network input", "cache-past-not-input"),
        (cache(after="Identity"), "must be a network output", "cache-present-not-output"),
        (cache(is_output=False), "must be a network output", "cache-present-not-output"),
    ],
)
def test_refused_by_tensorrt(trap, reason, rule):
    onnx.checker.check_model(trap, full_check=True)
    plan, said = trt_probe.build(trap)
    assert plan is None and reason in said
    assert rules(trap) == {rule}


def test_capacity_is_open_in_a_package_and_static_for_tensorrt():
    package = cache(capacity="capacity")
    assert "static sequence length" in trt_probe.parse(package).errors
    assert rules(package, lowered=True) == {"cache-capacity"}
    assert rules(package) == set()  # `llmtrt build` fixes it
    assert rules(cache(), lowered=True) == set()
    (unnamed,) = lint_model(cache(capacity=None))
    assert (unnamed.rule, unnamed.severity) == ("cache-capacity", "warning")


def test_another_reader_of_past_sees_what_was_written():
    late = [
        node("ReduceMax", ["present"], ["m"], keepdims=0),
        node("Sub", ["m", "m"], ["zero"]),
        node("Add", ["past", "zero"], ["y"], name="late"),
    ]
    trap = cache(FP32, read=late)

    def run(in_place: bool) -> np.ndarray:
        import onnxruntime

        shape = (1, 2, 16, 8)
        arrays = [np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)]
        past, other, y = map(onnxruntime.OrtValue.ortvalue_from_numpy, arrays)
        new, at = np.ones((1, 2, 1, 8), np.float32), np.array([5])
        bound = (loaded := session(trap)).io_binding()
        bound.bind_ortvalue_input("past", past)
        bound.bind_cpu_input("new", new)
        bound.bind_cpu_input("at", at)
        bound.bind_ortvalue_output("present", past if in_place else other)
        bound.bind_ortvalue_output("y", y)
        loaded.run_with_iobinding(bound)
        return y.numpy().copy()

    assert run(in_place=False).max() == 0
    assert run(in_place=True).max() == 1
    (finding,) = lint_model(trap)
    assert (finding.rule, finding.node) == ("cache-past-read", "late")
    shape_only = [node("Shape", ["past"], ["rows"]), node("Expand", ["present", "rows"], ["y"])]
    assert rules(cache(FP32, read=shape_only)) == set()


def test_int8_cache_next_to_its_fp16_form():
    """INT8 rows that are dequantized before Attention: what a user writes first."""
    scale = raw("scale", FP16, [], np.float16(0.1).tobytes())

    def attend(kind):
        shape, row = [1, 2, 16, 64], [1, 2, 1, 64]
        names = ("k", "v")
        nodes = [node("TensorScatter", [f"past_{n}", f"new_{n}", "at"], [f"present_{n}"]) for n in names]
        for n in names if kind == INT8 else ():
            nodes.append(node("DequantizeLinear", [f"present_{n}", "scale"], [f"half_{n}"]))
        read = "half" if kind == INT8 else "present"
        nodes.append(node("Attention", ["q", f"{read}_k", f"{read}_v"], ["y"]))
        inputs = [(f"{what}_{n}", kind, size) for n in names for what, size in (("past", shape), ("new", row))]
        inputs += [("q", FP16, [1, 4, 1, 64]), ("at", INT64, [1])]
        outputs = [("y", FP16, [1, 4, 1, 64]), *((f"present_{n}", kind, shape) for n in names)]
        return model(nodes, inputs, outputs, {"scale": scale} if kind == INT8 else {})

    assert "must have type Float, Half, or BFloat16" in trt_probe.parse(attend(INT8)).errors
    found = {finding.rule for finding in lint_model(attend(INT8)) if finding.rule.startswith("cache")}
    assert found == {"cache-type"}
    assert trt_probe.build(attend(FP16))[0]
    assert not any(finding.rule.startswith("cache") for finding in lint_model(attend(FP16)))
