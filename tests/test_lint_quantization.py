"""Quantized weights: what each runtime makes of the forms that ONNX allows."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import trt_probe
from onnx_models import BF16, FP16, FP32, INT64, model, node, optimized_nodes, pack_int4, raw, rules, run, session

from llmtrt.graph.lint import lint_model

T = onnx.TensorProto
NUMPY = {FP16: np.float16, FP32: np.float32, BF16: ml_dtypes.bfloat16}


def numbers(k, n, block, seed=0):
    """INT4 values [k, n] and a different scale for every row of scales."""
    values = np.random.default_rng(seed).integers(-7, 8, (k, n))
    return values, np.linspace(0.01, 0.05, -(-k // block))[:, None] * np.ones((1, n))


def product(k=64, n=32, block=32, kind=FP16, rows=None, zero_point=None, transposed=False, gemm=False, packed=T.INT4):
    """x [1, k] · DequantizeLinear(w, scale) with blocks along k."""
    values, scale = numbers(k, n, block)
    if rows is not None:
        scale = np.linspace(0.01, 0.05, rows)[:, None] * np.ones((1, n))
    values, scale = (values.T, scale.T) if transposed else (values, scale)
    data = pack_int4(values) if packed in (T.INT4, T.UINT4) else values.astype(np.int8).tobytes()
    constants = {
        "w": raw("w", packed, list(values.shape), data),
        "s": raw("s", kind, list(scale.shape), np.ascontiguousarray(scale).astype(NUMPY[kind]).tobytes()),
    }
    if zero_point is not None:
        zeros = np.full(scale.shape, zero_point)
        constants["z"] = raw(
            "z", packed, list(scale.shape), pack_int4(zeros) if packed == T.INT4 else bytes(zeros.flat)
        )
    nodes = [
        node(
            "DequantizeLinear", list(constants), ["d"], name="dequantize", axis=1 if transposed else 0, block_size=block
        )
    ]
    if gemm:
        nodes.append(node("Gemm", ["x", "d"], ["y"], transB=int(transposed)))
    else:
        nodes += [node("Transpose", ["d"], ["t"], perm=[1, 0])] if transposed else []
        nodes.append(node("MatMul", ["x", "t" if transposed else "d"], ["y"]))
    return model(nodes, [("x", kind, [1, k])], [("y", kind, [1, n])], constants)


def fusions(proto, folder):
    return [n.op_type for n in optimized_nodes(proto, folder) if n.op_type in ("MatMulNBits", "DequantizeLinear")]


def test_the_contracts_form_is_clean_right_and_fused(tmp_path):
    values, scale = numbers(64, 32, 32)
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    want = x.astype(np.float64) @ (values * np.repeat(scale, 32, 0))
    np.testing.assert_allclose(run(product(kind=FP32), x=x), want, rtol=1e-4, atol=1e-4)
    for kind in (FP16, FP32):
        assert fusions(product(kind=kind), tmp_path) == ["MatMulNBits"]
        assert trt_probe.build(product(kind=kind))[0]
        assert rules(product(kind=kind)) == set()
    assert rules(product(zero_point=0)) == set()
    assert trt_probe.build(product(zero_point=0))[0]


@pytest.mark.parametrize("packed", [T.UINT4, T.UINT8])
def test_unsigned_weights(packed):
    trap = product(packed=packed)
    onnx.checker.check_model(trap, full_check=True)
    assert trt_probe.parse(trap).errors
    assert "quant-unsigned" in rules(trap)


def test_zero_points():
    x = np.ones((1, 64), np.float32)
    assert abs(run(product(kind=FP32, zero_point=3), x=x) - run(product(kind=FP32), x=x)).max() > 1  # ORT heeds them
    assert "Non-zero zero point" in trt_probe.parse(product(zero_point=3)).errors
    assert rules(product(zero_point=3)) == {"quant-zero-point"}


def test_tensorrt_infers_blocks_from_shapes_and_ignores_block_size():
    """48 = 32 + 16 rows with two rows of scales: the very same plan as two blocks of 24."""
    of_32, of_24 = product(k=48, block=32), product(k=48, block=24)
    x = np.random.default_rng(1).standard_normal((1, 48)).astype(np.float16)
    assert abs(run(of_32, x=x).astype(float) - run(of_24, x=x)).max() > 0.1  # two different models
    assert trt_probe.build(of_32)[0] == trt_probe.build(of_24)[0] != trt_probe.build(product(k=48, block=16))[0]
    onnx.checker.check_model(of_32, full_check=True)
    (finding,) = lint_model(of_32)
    assert finding.rule == "quant-block-remainder" and "blocks of 24" in finding.message
    assert rules(product(k=48, block=16)) == set()


def test_dimension_that_no_block_divides():
    trap = product(k=80, block=32)
    onnx.checker.check_model(trap, full_check=True)
    run(trap, x=np.ones((1, 80), np.float16))
    assert "Inferred block size is not an integer" in trt_probe.parse(trap).errors
    assert rules(trap) == {"quant-block-remainder"}
    assert trt_probe.build(product(k=80, block=16))[0]
    assert rules(product(k=80, block=16)) == set()


def test_one_block_longer_than_the_dimension_is_the_dimension():
    x = np.random.default_rng(1).standard_normal((1, 16)).astype(np.float32)
    long, exact = (run(product(k=16, block=block, kind=FP32), x=x) for block in (32, 16))
    np.testing.assert_allclose(long, exact, rtol=1e-4, atol=1e-6)
    assert trt_probe.build(product(k=16, block=32))[0] == trt_probe.build(product(k=16, block=16))[0]
    assert rules(product(k=16, block=32)) == set()


@pytest.mark.parametrize("rows", [1, 4])
def test_scales_that_block_size_contradicts(rows):
    trap = product(k=64, block=32, rows=rows)
    onnx.checker.check_model(trap, full_check=True)
    with pytest.raises(Exception, match="DequantizeLinear"):
        run(trap, x=np.ones((1, 64), np.float16))
    assert trt_probe.build(trap)[0]
    assert rules(trap) == {"quant-scale-shape"}


@pytest.mark.parametrize("kind", [FP16, FP32])
@pytest.mark.parametrize("block", [2, 8, 16, 24, 32, 48, 64, 128, 256, 512, 1024])
def test_block_sizes_that_onnx_runtime_fuses(block, kind, tmp_path):
    proto = product(k=2 * block, block=block, kind=kind)
    fused = fusions(proto, tmp_path) == ["MatMulNBits"]
    assert rules(proto) == (set() if fused else {"quant-block-size"})
    assert not trt_probe.parse(proto).errors


@pytest.mark.parametrize("gemm", [False, True])
def test_transposed_layout(gemm, tmp_path):
    trap = product(transposed=True, gemm=gemm)
    assert fusions(trap, tmp_path) == ["DequantizeLinear"]
    assert trt_probe.build(trap)[0]
    assert rules(trap) == {"quant-layout"}
    fixed = product(gemm=gemm)
    assert fusions(fixed, tmp_path) == ["MatMulNBits"]
    assert rules(fixed) == set()


def integers(*nodes, kind=T.INT8, rows=64, columns=32, ids=False, **more):
    """Nodes over the quantized constant w [rows, columns] that end in y [1, columns], from x [1, rows] or ids [1]."""
    size = rows * columns // (2 if kind in (T.INT4, T.UINT4) else 1)
    constants = {"w": raw("w", kind, [rows, columns], bytes(size)), "s": np.ones((), np.float16), **more}
    inputs = [("ids", INT64, [1])] if ids else [("x", FP16, [1, rows])]
    return model(list(nodes), inputs, [("y", FP16, [1, columns])], constants)


CAST = node("Cast", ["w"], ["d"], to=FP16)
DEQUANTIZE = node("DequantizeLinear", ["w", "s"], ["d"])
MATMUL = node("MatMul", ["x", "d"], ["y"])
TRANSPOSED = [node("Transpose", ["w"], ["t"]), node("DequantizeLinear", ["t", "s"], ["d"]), MATMUL]
GATHER_FIRST = [node("Gather", ["w", "ids"], ["r"]), node("DequantizeLinear", ["r", "s"], ["y"])]


@pytest.mark.parametrize(
    ("trap", "reason"),
    [
        (integers(CAST, MATMUL), "only allowed before DQ"),
        (integers(*TRANSPOSED, rows=32), "only allowed before DQ"),
        (integers(*GATHER_FIRST, ids=True), "only allowed before DQ"),
        (integers(*GATHER_FIRST, kind=T.FLOAT8E4M3FN, ids=True), "is not consumed by"),
        (integers(CAST, MATMUL, kind=T.INT4), "is not consumed by"),
        (integers(*TRANSPOSED, kind=T.INT4, rows=32), "only allowed before DQ"),
    ],
)
def test_quantized_constant_elsewhere_than_in_dequantize_linear(trap, reason):
    plan, said = trt_probe.build(trap)
    assert plan is None and reason in said
    assert rules(trap) - {"onnx-checker"} == {"quant-constant-consumer"}  # ONNX has no Gather of FP8 either


def test_quantized_constants_in_dequantize_linear_are_clean():
    for kind in (T.INT8, T.INT4, T.FLOAT8E4M3FN):
        fixed = integers(DEQUANTIZE, MATMUL, kind=kind)
        assert trt_probe.build(fixed)[0]
        assert rules(fixed) == set()


def test_gather_from_int4():
    trap = integers(*GATHER_FIRST, kind=T.INT4, ids=True)
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(trap, full_check=True)
    assert trt_probe.build(trap)[0] is None
    assert rules(trap) == {"quant-int4-gather", "onnx-checker"}


def packed_embedding(table):
    """Four INT8 in one INT32, lowest first: Σ vⱼ · 256ʲ; Gather, then take apart."""
    packed = (table.astype(np.int64).reshape(len(table), -1, 4) * 256 ** np.arange(4)).sum(-1).astype(np.int32)
    nodes, left = [node("Gather", ["w", "ids"], ["p0"])], "p0"
    for part in range(4):
        nodes += [
            node("Add", [left, "half"], [f"a{part}"]),
            node("Mod", [f"a{part}", "base"], [f"b{part}"]),
            node("Sub", [f"b{part}", "half"], [f"v{part}"]),
            node("Sub", [left, f"v{part}"], [f"c{part}"]),
            node("Div", [f"c{part}", "base"], [f"p{part + 1}"]),
            node("Unsqueeze", [f"v{part}", "last"], [f"u{part}"]),
        ]
        left = f"p{part + 1}"
    nodes += [
        node("Concat", [f"u{part}" for part in range(4)], ["all"], axis=-1),
        node("Reshape", ["all", "flat"], ["i"]),
        node("Cast", ["i"], ["f"], to=FP16),
        node("Mul", ["f", "s"], ["y"]),
    ]
    constants = {
        "w": packed,
        "half": np.array(128, np.int32),
        "base": np.array(256, np.int32),
        "last": np.array([-1]),
        "flat": np.array([1, table.shape[1]]),
        "s": np.array(0.5, np.float16),
    }
    return model(nodes, [("ids", INT64, [1])], [("y", FP16, [1, table.shape[1]])], constants)


def test_embedding_that_is_dequantized_whole(tmp_path):
    table = np.random.default_rng(0).integers(-127, 128, (512, 64)).astype(np.int8)
    trap = model(
        [node("DequantizeLinear", ["w", "s"], ["d"]), node("Gather", ["d", "ids"], ["y"])],
        [("ids", INT64, [1])],
        [("y", FP16, [1, 64])],
        {"w": table, "s": np.array(0.5, np.float16)},
    )
    readers = [n.op_type for n in optimized_nodes(trap, tmp_path) if "w" in n.input]
    assert readers == ["DequantizeLinear"]  # the whole table, at every step
    assert rules(trap) == {"quant-embedding"}

    fixed = packed_embedding(table)
    assert [n.op_type for n in optimized_nodes(fixed, tmp_path) if "w" in n.input] == ["Gather"]
    np.testing.assert_array_equal(run(fixed, ids=np.array([7])), table[[7]] * np.float16(0.5))
    assert trt_probe.build(fixed)[0]
    assert rules(fixed) == set()


def test_uint8_constants_grow_fourfold():
    table = np.random.default_rng(0).integers(0, 256, (1024, 512)).astype(np.uint8)
    nodes = [node("Gather", ["w", "ids"], ["r"]), node("Cast", ["r"], ["y"], to=FP16)]
    trap = model(nodes, [("ids", INT64, [1])], [("y", FP16, [1, 512])], {"w": table})
    as_int32 = model(nodes, [("ids", INT64, [1])], [("y", FP16, [1, 128])], {"w": table.view(np.int32)})
    grown, plain = len(trt_probe.build(trap)[0]), len(trt_probe.build(as_int32)[0])
    assert abs(grown - plain - 3 * table.nbytes) < 0.1 * table.nbytes
    assert rules(trap) == {"uint8-constant"}
    assert rules(as_int32) == set()


@pytest.mark.parametrize("name", ["UINT4", "INT2", "UINT2", "INT16", "UINT16", "UINT32", "UINT64", "FLOAT8E5M2"])
def test_constants_of_types_that_tensorrt_does_not_know(name):
    kind = getattr(T, name)
    bits = {"UINT4": 4, "INT2": 2, "UINT2": 2, "INT16": 16, "UINT16": 16, "UINT32": 32, "UINT64": 64, "FLOAT8E5M2": 8}
    trap = model(
        [CAST, MATMUL],
        [("x", FP16, [1, 64])],
        [("y", FP16, [1, 32])],
        {"w": raw("w", kind, [64, 32], bytes(64 * 32 * bits[name] // 8))},
    )
    assert "Failed to import initializer" in trt_probe.parse(trap).errors
    assert "constant-type" in rules(trap)
    fixed = model([CAST, MATMUL], [("x", FP16, [1, 64])], [("y", FP16, [1, 32])], {"w": np.zeros((64, 32), np.int32)})
    assert trt_probe.build(fixed)[0]
    assert rules(fixed) == set()


def test_bf16_runs_on_tensorrt_alone():
    trap = product(kind=BF16)
    with pytest.raises(Exception, match="DequantizeLinear"):
        session(trap)
    assert trt_probe.build(trap)[0]
    (finding,) = lint_model(trap)
    assert (finding.rule, finding.severity) == ("bf16-onnxruntime", "warning")
    assert lint_model(trap, lowered=True) == []
