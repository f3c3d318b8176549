"""Lowerings against the canonical form: the same numbers on ONNX Runtime, and engines where that form gives none."""

from dataclasses import replace

import families
import numpy as np
import onnx
import onnx_ir as ir
import onnx_models
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass

from llmtrt.engine.flavor import choose
from llmtrt.engine.logger import make_logger
from llmtrt.engine.parse import parse
from llmtrt.errors import UserError
from llmtrt.graph import packed, packed_product
from llmtrt.graph.lowering import Lowering, Target, lower
from llmtrt.graph.lowerings import LOWERINGS
from llmtrt.graph.lowerings.weight_inputs import weight_of
from llmtrt.graph.rewrite import WRITTEN_OUT, Rewrite
from llmtrt.graph.structure import load_graph
from llmtrt.quantization.pipeline import quantize
from llmtrt.quantization.recipe import Recipe

CAPACITY = 48
TARGET = Target("rtx", frozenset(), CAPACITY)
TYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


def attention_model(dtype: str, heads: int, kv_heads: int, head_dim: int, **attributes) -> ir.Model:
    """The contract's attention: write k, v into the cache at write_at, attend to its first L rows under a mask."""
    kind = TYPES[dtype]
    cache = ["B", kv_heads, "capacity", head_dim]
    inputs = [
        ("q", kind, ["B", heads, "S", head_dim]),
        ("k", kind, ["B", kv_heads, "S", head_dim]),
        ("v", kind, ["B", kv_heads, "S", head_dim]),
        ("write_at", TensorProto.INT64, ["B"]),
        ("kv_range", TensorProto.INT64, ["L"]),
        ("mask", TensorProto.BOOL, ["B", 1, "S", "L"]),
        ("past_key_0", kind, cache),
        ("past_value_0", kind, cache),
    ]
    outputs = [
        ("y", kind, ["B", heads, "S", head_dim]),
        ("present_key_0", kind, cache),
        ("present_value_0", kind, cache),
    ]
    nodes = [
        helper.make_node("TensorScatter", ["past_key_0", "k", "write_at"], ["present_key_0"], axis=2),
        helper.make_node("TensorScatter", ["past_value_0", "v", "write_at"], ["present_value_0"], axis=2),
        helper.make_node("Shape", ["kv_range"], ["length"]),
        helper.make_node("Slice", ["present_key_0", "zero", "length", "two"], ["keys"]),
        helper.make_node("Slice", ["present_value_0", "zero", "length", "two"], ["values"]),
        helper.make_node("Attention", ["q", "keys", "values", "mask"], ["y"], name="layer.0/Attention", **attributes),
    ]
    constants = [helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in (("zero", 0), ("two", 2))]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        constants,
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))


def run(model: ir.Model, feeds: dict) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def build(model: ir.Model, feeds: dict) -> tuple[bool, str]:
    """Whether TensorRT builds it for the shapes of ``feeds``, and its reason if not."""
    flavor = choose()
    trt, logger = flavor.module, make_logger(flavor)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = parse(flavor, network, ir.to_proto(model).SerializeToString(), "model.onnx", logger)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, value in feeds.items():
        profile.set_shape(name, value.shape, value.shape, value.shape)
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    del parser
    return built is not None, logger.reason()


def feeds_for(dtype: str, heads: int, kv_heads: int, head_dim: int, rows: int = 5, batch: int = 2) -> dict:
    rng = np.random.default_rng(heads * head_dim)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    write_at = np.array([0, 17], np.int64)[:batch]
    positions = (write_at[:, None] + np.arange(rows))[:, None, :, None]
    columns = np.arange(32)
    return {
        "q": draw(batch, heads, rows, head_dim),
        "k": draw(batch, kv_heads, rows, head_dim),
        "v": draw(batch, kv_heads, rows, head_dim),
        "write_at": write_at,
        "kv_range": columns.astype(np.int64),
        "mask": (columns <= positions) & (columns > positions - 9),
        "past_key_0": draw(batch, kv_heads, CAPACITY, head_dim),
        "past_value_0": draw(batch, kv_heads, CAPACITY, head_dim),
    }


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (6, 2), (3, 1), (5, 5)])
@pytest.mark.parametrize("dtype, head_dim, tolerance", [("float32", 16, 2e-6), ("float16", 8, 4e-3)])
def test_decomposed_attention_has_the_canonical_numbers(heads, kv_heads, dtype, head_dim, tolerance):
    for attributes in ({}, {"scale": 0.7, "is_causal": 0}):
        model = attention_model(dtype, heads, kv_heads, head_dim, **attributes)
        feeds = feeds_for(dtype, heads, kv_heads, head_dim)
        lowered, names = lower(model, TARGET)
        assert names == ["static_capacity", "decomposed_attention"]
        assert "Attention" not in {node.op_type for node in lowered.graph}
        onnx.checker.check_model(ir.to_proto(lowered), full_check=True)
        (y, *caches), (wanted, *wanted_caches) = run(lowered, feeds), run(model, feeds)
        assert wanted.std() > 0.1
        assert np.abs(y.astype(np.float64) - wanted).max() <= tolerance
        assert all(np.array_equal(a, b) for a, b in zip(caches, wanted_caches))


def test_a_row_that_sees_nothing_stays_finite():
    feeds = feeds_for("float16", 4, 2, 8)
    feeds["mask"][1, :, -1] = False  # a row of padding beyond its window
    lowered, _ = lower(attention_model("float16", 4, 2, 8), TARGET)
    assert np.isfinite(run(lowered, feeds)[0]).all()


@pytest.mark.parametrize(
    "dtype, heads, head_dim, rows",
    [
        ("float32", 4, 16, 5),
        ("float16", 4, 8, 5),
        ("float16", 4, 12, 5),
        ("float16", 4, 264, 5),
        ("float16", 3, 16, 1),
    ],
)
def test_decomposed_attention_builds_where_the_canonical_form_does_not(dtype, heads, head_dim, rows):
    pytest.importorskip("tensorrt_rtx_bindings")
    model, feeds = attention_model(dtype, heads, 1, head_dim), feeds_for(dtype, heads, 1, head_dim, rows, batch=1)
    built, reason = build(lower(model, TARGET, LOWERINGS[:1])[0], feeds)
    assert not built and reason
    lowered, names = lower(model, TARGET)
    assert names == ["static_capacity", "decomposed_attention"]
    assert build(lowered, feeds) == (True, "")


@pytest.mark.parametrize("head_dim", [16, 24, 256])
def test_native_attention_stays_where_it_builds(head_dim):
    pytest.importorskip("tensorrt_rtx_bindings")
    model, names = lower(attention_model("float16", 4, 2, head_dim), TARGET)
    assert names == ["static_capacity"]
    assert build(model, feeds_for("float16", 4, 2, head_dim, rows=1, batch=1)) == (True, "")


def test_static_capacity_fixes_caches_in_a_copy():
    model = attention_model("float16", 4, 2, 16)
    lowered, _ = lower(model, TARGET)
    shapes = {value.name: list(value.shape) for value in [*lowered.graph.inputs, *lowered.graph.outputs]}
    caches = [shapes[f"{when}_{what}_0"] for when in ("past", "present") for what in ("key", "value")]
    assert [shape[1:] for shape in caches] == [[2, CAPACITY, 16]] * 4
    assert not isinstance(next(v for v in model.graph.inputs if v.name == "past_key_0").shape[2], int)
    fixed, _ = lower(lowered, TARGET)  # again: nothing left to do
    with pytest.raises(UserError, match="past_key_0.*64 was expected"):
        lower(fixed, Target("rtx", frozenset(), 64))


def test_an_attention_that_is_not_the_contracts_is_refused_by_name():
    with pytest.raises(UserError, match=r"layer\.0/Attention.*softcap"):
        lower(attention_model("float32", 4, 2, 16, softcap=30.0), TARGET)


def test_a_lowering_is_applied_only_where_it_says_so():
    seen = []
    lowerings = [
        Lowering("never", lambda m, t: False, lambda m, t: seen.append(m)),
        Lowering("small", lambda m, t: t.capacity < 64, lambda m, t: m),
    ]
    assert lower(attention_model("float16", 4, 2, 8), TARGET, lowerings)[1] == ["small"]
    assert not seen


def test_split_attention_stays_in_range_where_a_long_context_is_flat():
    """8,192 rows of equal weight and values of 40: their sum is past fp16, their mean is not. On ONNX's own evaluator, which
    rounds each value to its type, as ONNX Runtime does not."""
    heads, dim, context = 4, 16, 8192
    model = attention_model("float16", heads, 2, dim)
    lowered, names = lower(model, Target("rtx", frozenset(), context, one_row=True))
    assert names == ["static_capacity", "one_row", "value_rows", "one_row_attention"]
    proto = ir.to_proto(lowered)
    nodes = [
        node for node in proto.graph.node if node.op_type != "TensorScatter"
    ]  # which ONNX's evaluator does not have
    assert "Attention" not in {node.op_type for node in nodes}
    inputs = [value for value in proto.graph.input if not value.name.startswith("past_")]
    for name, dims in (("present_key_0", [1, 2, context, dim]), ("present_value_0", [1, 1, context, 2 * dim])):
        inputs.append(helper.make_value_info(name, helper.make_tensor_type_proto(TensorProto.FLOAT16, dims)))
    outputs = [value for value in proto.graph.output if value.name == "y"]
    graph = helper.make_graph(nodes, "split", inputs, outputs, proto.graph.initializer)
    rng = np.random.default_rng(0)
    feeds = {
        "q": rng.standard_normal((1, heads, 1, dim)).astype(np.float16),
        "kv_range": np.arange(context),
        "mask": np.arange(context)[None, None, None] < context - 100,
        "k": np.zeros((1, 2, 1, dim), np.float16),
        "v": np.zeros((1, 2, 1, dim), np.float16),
        "write_at": np.array([context - 101]),
        "present_key_0": np.zeros((1, 2, context, dim), np.float16),
        "present_value_0": np.zeros((1, 1, context, 2 * dim), np.float16),
        "value_rows_0": np.full((context // 256, 256, 2 * dim), 40, np.float16),
    }
    (y,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])).run(["y"], feeds)
    assert np.abs(y - 40).max() <= 0.1


def package_graph(name: str, folder, recipe):
    package = quantize(families.save(name, folder / "checkpoint"), folder / "package", recipe).package
    return package, load_graph(package)


def step_of(spec, rows: int, capacity: int, context: int, batch: int = 1) -> dict:
    """``rows`` tokens of each sequence from position 200 on, of the second from 137 on, behind a cache of which ``context``
    rows are in sight."""
    rng = np.random.default_rng(3)
    feeds = {
        "input_ids": rng.integers(0, spec.vocab_size, (batch, rows)),
        "positions": 200 - 63 * np.arange(batch)[:, None] + np.arange(rows),
        "logits_index": np.full((batch, 1), rows - 1),
        "kv_range": np.arange(context),
    }
    shape = (batch, spec.kv_heads, capacity, spec.head_dim)
    for layer in range(spec.layers):
        for which in ("key", "value"):
            feeds[f"past_{which}_{layer}"] = rng.standard_normal(shape, np.float32).astype(spec.kv_dtype)
    return feeds


def run_in(folder, model: ir.Model, feeds: dict) -> list[np.ndarray]:
    """As ``run``, for a graph whose weights lie in ``folder``, or are given to its inputs."""
    import onnxruntime as ort

    given = {value.name: weight_of(value) for value in model.graph.inputs if weight_of(value) is not None}
    feeds = feeds | {name: tensor.numpy() for name, tensor in given.items()}
    path = folder / "lowered.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    path.unlink()
    return session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})


def value_rows(values: np.ndarray) -> np.ndarray:
    """[B, Hkv, C, D] with the values of a token side by side, [B, 1, C, Hkv · D]."""
    batch, _, capacity, _ = values.shape
    return values.transpose(0, 2, 1, 3).reshape(batch, 1, capacity, -1)


def by_rows(feeds: dict, presents: list[np.ndarray], context: int) -> dict:
    """The same for a graph with ``value_rows``. On a GPU, the rows that are an input are of the memory that the step writes
    its own to, so here they are of the ``presents``, keys and values of each layer, that it should leave."""
    found = dict(feeds)
    for index, values in enumerate(presents[1::2]):
        found[f"past_value_{index}"] = value_rows(feeds[f"past_value_{index}"])
        seen = value_rows(values)[0, 0, :context]
        found[f"value_rows_{index}"] = seen.reshape(-1, 256, seen.shape[-1])
    return found


def splits_in(model: ir.Model) -> set[int]:
    """Those of the scores [splits, Hkv, group, rows] of each attention in ``model``."""
    names = {value.name for value in model.graph.inputs if value.name.startswith("value_rows_")}
    inferred, found = ShapeInferencePass()(model.clone()).model, set()
    for node in inferred.graph:
        if node.op_type == "MatMul" and node.inputs[1].producer() and node.inputs[1].producer().inputs[0].name in names:
            found.add(node.outputs[0].shape[0])
    return found


def test_rows_of_values_are_read_only_behind_the_steps_own_write(tmp_path):
    """They are of the same memory, of which TensorRT knows nothing: what they are multiplied with has to need the write."""
    package, model = package_graph("llama-even", tmp_path, Recipe("none"))
    lowered, _ = lower(model, Target("rtx", frozenset(), 512, "inputs", True, value_rows=True))
    for index in range(package.spec.layers):
        (rows,) = (value for value in lowered.graph.inputs if value.name == f"value_rows_{index}")
        (written,) = (value for value in lowered.graph.outputs if value.name == f"present_value_{index}")
        readers = [user for user in rows.consumers() if user.op_type != "Shape"]
        while readers[0].op_type == "Reshape":
            readers = list(readers[0].outputs[0].consumers())
        assert [reader.op_type for reader in readers] == ["MatMul"]
        assert written in needed_for(readers[0].inputs[0])


def needed_for(value: ir.Value) -> set[ir.Value]:
    """All values that ``value`` is computed from."""
    found, left = set(), [value]
    while left:
        maker = left.pop().producer()
        new = set(maker.inputs if maker else ()) - found
        found |= new
        left += new
    return found


@pytest.mark.parametrize("rows_of_values", [False, True])
@pytest.mark.parametrize("name, capacity", [("llama-even", 512), ("phi3-even", 8192), ("mistral", 512)])
def test_a_graph_with_both_forms_of_attention_has_the_canonical_numbers(name, capacity, rows_of_values, tmp_path):
    """Steps of one row take one form, and those of several, or of one in a prefill profile, the other."""
    package, model = package_graph(name, tmp_path, Recipe("none"))
    target = Target("rtx", frozenset(["empty_branches"]), capacity, value_rows=rows_of_values)
    lowered, names = lower(model, target)
    assert names == ["static_capacity", *["value_rows"] * rows_of_values, "split_attention"]
    assert "Attention" in {node.op_type for node in lowered.graph}
    decode = lowered.clone()
    for node in list(decode.graph):  # ONNX Runtime's Attention takes no empty q; TensorRT drops it
        source = node.inputs[0].producer() if node.op_type == "Concat" else None
        if source is not None and source.op_type == "Attention":
            node.replace_input_with(0, node.inputs[1])
            node.resize_inputs(1)
            decode.graph.outputs.append(source.inputs[0])
            decode.graph.remove(source, safe=True)
    for rows, few, graph in ((1, 1, decode), (1, 0, lowered), (5, 0, lowered)):
        feeds = step_of(package.spec, rows, capacity, 256, batch=2)
        wanted = run_in(package.path, model, feeds)
        if rows_of_values:
            feeds = by_rows(feeds, wanted[1:], 256)
            wanted[2::2] = map(value_rows, wanted[2::2])
        found = run_in(package.path, graph, feeds | {"decode_rows": np.zeros(few, np.int64)})
        found, left = found[: len(wanted)], found[len(wanted) :]
        assert all(q.shape[2] == 0 for q in left) and len(left) == (package.spec.layers if few else 0)
        assert wanted[0].std() > 0.01
        for ours, expected in zip(found, wanted, strict=True):
            assert np.abs(ours.astype(np.float64) - expected).max() <= 1e-2 * np.ptp(expected.astype(np.float64))


def test_projections_of_one_value_are_merged_and_have_the_canonical_numbers(tmp_path):
    package, model = package_graph("llama-even", tmp_path, Recipe("rtn", 64, "float32"))
    target = Target("rtx", frozenset(), 512, merges=True)
    lowered, names = lower(model, target)
    assert "merged_projections" in names and "merged_projections" not in lower(model, replace(target, merges=False))[1]
    count = sum(node.op_type == "DequantizeLinear" for node in model.graph)
    assert sum(node.op_type == "DequantizeLinear" for node in lowered.graph) == count - 3 * package.spec.layers
    assert sum(value.const_value.nbytes for value in lowered.graph.initializers.values()) == sum(
        value.const_value.nbytes for value in model.graph.initializers.values()
    )
    feeds = step_of(package.spec, 5, 512, 256)
    for ours, expected in zip(run_in(package.path, lowered, feeds), run_in(package.path, model, feeds), strict=True):
        assert np.abs(ours - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.mark.parametrize(
    "one_row, capacity", [(True, 512), (True, 32768), (False, 512)], ids=["one row", "one row of a long cache", "rows"]
)
@pytest.mark.parametrize(
    "name, recipe, tolerance",
    [
        ("llama-even", Recipe("rtn", 64, "float32"), 1e-5),
        ("llama-even", Recipe("rtn", 64, "float16", lm_head="int4"), 1e-2),
        ("llama-even", Recipe("rtn", 64, "float32", embedding="int8", lm_head="int8"), 1e-5),
        ("phi3-even", Recipe("rtn", 128, "float32"), 1e-5),
        ("mistral-sliding", Recipe("none", dtype="float32"), 1e-5),
        ("gemma3", Recipe("none", dtype="float32"), 1e-5),
        ("qwen3", Recipe("none"), 1e-2),
    ],
)
def test_weights_as_inputs_have_the_canonical_numbers(name, recipe, tolerance, one_row, capacity, tmp_path):
    package, model = package_graph(name, tmp_path, recipe)
    lowered, names = lower(model, Target("rtx", frozenset(), capacity, "inputs", one_row, value_rows=True))
    assert {"weight_inputs", "value_rows"} <= set(names) and ("one_row_attention" in names) == one_row
    kinds = {node.op_type for node in lowered.graph}
    assert "MatMulNBits" not in kinds and not (one_row and kinds & {"Attention", "RotaryEmbedding"})
    vector = 4 * max(package.spec.vocab_size, 512)
    left = {name for name, value in lowered.graph.initializers.items() if value.const_value.nbytes > vector}
    head = {"lm_head.weight"} if recipe.lm_head == "int4" and not one_row else set()
    assert {name.removesuffix("_scale") for name in left} == head, left
    if one_row:
        assert splits_in(lowered) == ({8} if capacity == 512 else {16})
    feeds = step_of(package.spec, 1 if one_row else 5, capacity, 256)
    wanted, *wanted_caches = run_in(package.path, model, feeds)
    logits, *caches = run_in(package.path, lowered, by_rows(feeds, wanted_caches, 256))
    wanted_caches[1::2] = map(value_rows, wanted_caches[1::2])
    assert wanted.std() > 0.01
    added = [value.name for value in lowered.graph.outputs][len(model.graph.outputs) :]
    assert len(added) == len(caches) - len(wanted_caches) and all(name.startswith(WRITTEN_OUT) for name in added)
    assert bool(added) == one_row
    for ours, expected in zip((logits, *caches), (wanted, *wanted_caches)):
        assert np.abs(ours.astype(np.float64) - expected).max() <= tolerance * np.ptp(expected.astype(np.float64))


def matrix_of(q: np.ndarray, scale: np.ndarray, block: int | None) -> packed.Matrix:
    """As a package stores it: INT4 in blocks, or INT8 by columns (``block`` None)."""
    tensor = ir.tensor(q)
    if block:
        content = np.frombuffer(onnx_models.pack_int4(q), np.uint8)
        tensor = ir.PackedTensor(content, ir.DataType.INT4, shape=ir.Shape(q.shape))
    return packed.Matrix(tensor, ir.tensor(scale), block)


@pytest.mark.parametrize(
    "k, block", [(128, 64), (192, 64), (64, 64), (256, 128), (384, 128), (512, 256), (2048, 64), (4096, 128)]
)
def test_packed_weights_are_the_matrix(k, block):
    """The layout read as its description says, in float64."""
    rng, columns = np.random.default_rng(k), (6, 4)
    matrices, expected = [], []
    for n in columns:
        q = rng.integers(-8, 8, (k, n)).astype(np.int8)
        q[:4, :4] = [[-8, -8, 7, 7], [7, -8, 7, -8], [0, -1, 1, 0], [-8, 7, -7, 1]]
        scale = rng.uniform(0.01, 1, (k // block, n)).astype(np.float16)
        matrices.append(matrix_of(q, scale, block))
        expected.append((q * np.repeat(scale.astype(np.float64), block, 0)).T)
    arrays = {kind: tensor.numpy().astype(np.float64) for kind, tensor in packed.arrays("w", matrices).items()}
    count, blocks = packed.slices(k), -(-k // 128)
    scale, scale_hi = (
        np.concatenate([arrays.get(f"{kind}_{index}", arrays[f"scale_{index}"]) for index in range(count)], 1) / 16
        for kind in ("scale", "scale_hi")
    )
    assert len(arrays) == 1 + count * (1 + (block == 64)) and count == {2048: 2, 4096: 4}.get(k, 1)
    v = arrays["bytes"]
    assert v.shape == (10, blocks, 64) and scale.shape == scale_hi.shape == (10, blocks, 1)
    hi = np.floor(v / 16)
    found = np.stack([(v - 16 * hi - 8) * scale, hi * scale_hi], 2).reshape(10, -1)
    assert np.array_equal(found[:, :k], np.concatenate(expected)) and not found[:, k:].any()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("k, block", [(640, 64), (2048, 128), (2048, 64), (4096, 128), (14336, 128), (4096, None)])
def test_a_product_of_packed_weights_is_the_matrix_product(k, block, rows):
    """Of values as large as fp16 models have them, which no sum on the way may leave fp16 with; against float64, on ONNX
    Runtime, which sums in fp32, and on ONNX's reference, which rounds each number to fp16."""
    rng, n = np.random.default_rng(k), 12
    largest = 8 if block else 128
    q = rng.integers(-largest, largest, (k, n)).astype(np.int8)
    scale = (rng.uniform(0.08, 0.16, (k // block, n) if block else n) / largest).astype(np.float16)
    x, massive = rng.standard_normal((1, rows, k)).astype(np.float16), rng.integers(0, k, 3)
    x[:, :, massive], q[massive] = 1500, largest - 1  # massive activations, by the largest weights
    arrays = packed.arrays("w", [matrix_of(q, scale, block)])
    given = ir.val("x", ir.DataType.FLOAT16, x.shape)
    node = ir.node("Identity", [given])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", given.type, ir.Shape([1, rows, n])
    inputs = {kind: ir.val(kind, each.dtype, each.shape) for kind, each in arrays.items()}
    graph = ir.Graph([given, *inputs.values()], node.outputs, nodes=[node], opset_imports={"": 24}, name="product")
    new = Rewrite(node)
    new.replace((packed_product.row if rows == 1 else packed_product.rows)(new, given, inputs, k, n))
    model, feeds = ir.Model(graph, ir_version=11), {"x": x} | {kind: each.numpy() for kind, each in arrays.items()}
    wide = scale.astype(np.float64)
    expected = x.astype(np.float64) @ (q * (np.repeat(wide, block, 0) if block else wide))
    for (y, *_), tolerance in (
        (run(model, feeds), 2e-3),
        (ReferenceEvaluator(ir.to_proto(model)).run(None, feeds), 5e-3),
    ):
        assert np.linalg.norm(y - expected) < tolerance * np.linalg.norm(expected)


def test_a_matrix_that_cannot_be_packed_is_named(tmp_path):
    package, model = package_graph("mistral", tmp_path, Recipe("rtn", 16, "float32"))
    with pytest.raises(
        UserError, match=r"q_proj.weight \[48, 64\] in blocks of 16 cannot be an input: .*--weights plan"
    ):
        lower(model, Target("rtx", frozenset(), 512, "inputs"))
