"""Packages into engines, ahead of time on a machine without a GPU, and every way in which that can fail."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import onnx
import pytest
import random_package
from onnx import TensorProto, helper

pytest.importorskip("tensorrt_rtx_bindings")

import families

from llmtrt import files
from llmtrt.engine import build as building
from llmtrt.engine.build import build
from llmtrt.engine.flavor import choose
from llmtrt.engine.gpu import Gpus, find_gpus
from llmtrt.engine.logger import make_logger
from llmtrt.engine.manifest import ENGINE, GREEDY, PLAN, SAMPLER, open_engine
from llmtrt.engine.monitor import make_monitor
from llmtrt.engine.options import BuildOptions
from llmtrt.engine.parse import parse
from llmtrt.engine.profiles import decoder_profiles, one_row_profile
from llmtrt.errors import UserError
from llmtrt.graph import lowerings
from llmtrt.graph.structure import load_graph, structure_digest, weights
from llmtrt.package import open_package
from llmtrt.quantization.pipeline import quantize
from llmtrt.quantization.recipe import Recipe

CPU_ONLY = pytest.mark.skipif(not find_gpus().problem, reason="tells what a machine without a GPU cannot do")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A Mistral of 4 heads over 2, head dim 16, INT4 blocks, fp16, and a context of 256."""
    folder = tmp_path_factory.mktemp("package")
    checkpoint = families.save("mistral", folder / "checkpoint")
    return quantize(checkpoint, folder / "package", Recipe(group_size=16)).package.path


@pytest.fixture(scope="module")
def engine(package, tmp_path_factory):
    calls = []
    output = tmp_path_factory.mktemp("engine") / "engine"
    built = build(package, output, max_batch=2, max_seq=64, chunk=16, report=lambda *call: calls.append(call))
    return built, calls


def test_an_engine_knows_what_it_was_built_for(engine, package):
    built, calls = engine
    opened = open_engine(built.engine.path)
    assert opened == built.engine and ENGINE.is_at(opened.path)
    assert (opened.max_batch, opened.max_seq, opened.chunk, opened.capacity) == (2, 64, 16, 256)
    assert opened.spec == open_package(package).spec and opened.flavor == "rtx"
    assert opened.package_path == package.resolve()
    assert opened.manifest["lowerings"] == ["static_capacity", "split_attention", "merged_projections"]
    assert opened.manifest["flags"] == []
    assert opened.manifest["format_version"] == 8 and opened.debug_tensors == []
    assert opened.manifest["limits"] == {"workspace": None, "tactic_shared_memory": None}
    assert opened.manifest["runtime"] == {"kernel_specialization": "NONE"}
    assert not (opened.stripped or opened.refittable or opened.streams or opened.version_compatible)
    for name in (PLAN, GREEDY, SAMPLER):
        assert opened.manifest["files"][name]["bytes"] == (opened.path / name).stat().st_size > 100_000
    decode, prefill, of_one, of_two = opened.profiles
    assert decode["shapes"]["input_ids"] == [[1, 1], [1, 1], [2, 1]]
    assert of_two["shapes"]["input_ids"] == of_two["shapes"]["positions"] == [[2, 1]] * 3
    assert of_one["shapes"]["input_ids"] == [[1, 1]] * 3
    assert [each["shapes"]["decode_rows"] for each in opened.profiles] == [[[rows]] * 3 for rows in (1, 0, 1, 1)]
    assert prefill["shapes"]["input_ids"] == [[1, 1], [1, 16], [2, 16]]
    assert prefill["shapes"]["logits_index"] == [[1, 1], [1, 1], [2, 16]]
    assert all(each["shapes"]["kv_range"] == [[256], [256], [256]] for each in opened.profiles)
    assert decode["shapes"]["past_key_0"] == [[1, 2, 256, 16], [1, 2, 256, 16], [2, 2, 256, 16]]
    assert opened.plan.stat().st_size > 100_000 and built.peak_host_bytes > built.engine.plan.stat().st_size
    assert calls[-1][:2] == (1, 1) and len({call[2] for call in calls if len(call) == 3}) > 3


def test_two_builds_differ_in_the_plan_alone(engine, package):
    built, _ = engine
    again = build(package, built.engine.path.with_name("again"), max_batch=2, max_seq=64, chunk=16)
    first, second = (json.loads((e.path / "manifest.json").read_text()) for e in (built.engine, again.engine))
    for manifest in (first, second):
        for name in (PLAN, GREEDY, SAMPLER):
            del manifest["files"][name]
    assert first == second


def test_a_moved_or_changed_package_is_not_taken_for_the_engines_own(package, tmp_path):
    shutil.copytree(package, tmp_path / "package")
    engine = build(tmp_path / "package", tmp_path / "engine", max_seq=32, chunk=8).engine
    both = tmp_path / "moved"
    both.mkdir()
    shutil.move(tmp_path / "package", both / "package")
    assert open_engine(engine.path).package_path is None
    shutil.move(engine.path, both / "engine")
    assert open_engine(both / "engine").package_path == (both / "package").resolve()
    manifest = both / "package" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    assert open_engine(both / "engine").package_path is None


@pytest.fixture
def configured(monkeypatch):
    """What TensorRT's own IBuilderConfig says when it is handed over to build: flags, targets, number of profiles."""
    trt, seen = choose("rtx").module, []

    class Builder(trt.Builder):
        def build_serialized_network(self, network, config):
            flags = {name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)}
            targets = [config.get_compute_capability(index).name for index in range(config.num_compute_capabilities)]
            kinds = trt.MemoryPoolType
            limits = [config.get_memory_pool_limit(kind) for kind in (kinds.WORKSPACE, kinds.TACTIC_SHARED_MEMORY)]
            seen.append((flags, targets, config.num_optimization_profiles, *limits))
            return super().build_serialized_network(network, config)

    monkeypatch.setattr(trt, "Builder", Builder)
    return seen


def test_fp32_is_computed_in_fp32_for_every_default_gpu(package, tmp_path, configured):
    build(package, tmp_path / "engine", max_seq=32, chunk=8)
    # Decoder, and the two samplers; TF32 is on by default.
    assert [each[:3] for each in configured] == [(set(), [], 2), (set(), [], 1), (set(), [], 1)]
    assert len({each[3:] for each in configured}) == 1 and configured[0][3:] != (64 << 20, 48 << 10)


def test_fp32_is_lowered_and_options_are_recorded(tmp_path, configured):
    checkpoint = families.save("llama-gqa-tied", tmp_path / "checkpoint")
    quantize(checkpoint, tmp_path / "package", "fp32")
    engine = build(
        tmp_path / "package",
        tmp_path / "engine",
        max_seq=32,
        chunk=64,
        weight_streaming=True,
        compute_capabilities=("12.0", "8.9"),
    ).engine
    assert engine.manifest["lowerings"] == ["static_capacity", "decomposed_attention"]
    assert engine.manifest["flags"] == ["WEIGHT_STREAMING"]
    assert engine.compute_capabilities == ("8.9", "12.0")
    targets = ["SM89", "SM120"]
    assert [each[:3] for each in configured] == [({"WEIGHT_STREAMING"}, targets, 2), *[(set(), targets, 1)] * 2]
    assert engine.chunk == 32  # no larger than the context


def test_the_manifest_tells_what_memory_the_plan_takes(engine, tmp_path, monkeypatch):
    """The weights that the builder counts are the graph's own, each from 256 bytes on; in tiny matrices, some twice."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    more = {"num_hidden_layers": 2, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
    monkeypatch.setitem(random_package.SHAPES, "larger", sizes | more)
    larger = random_package.write(tmp_path / "package", "larger")
    built = build(larger.path, tmp_path / "engine", max_batch=2, max_seq=64, chunk=16).engine
    tensors = weights(load_graph(larger)).values()
    whole, counted = sum(tensor.nbytes for tensor in tensors), built.manifest["memory"]["weights"]
    assert 0.98 * whole <= counted <= 1.02 * whole and built.weight_bytes == counted  # equal norms are one
    assert built.manifest["memory"]["largest_weight"] == 2 * 2048 * 512 // 2  # gate and up in one, INT4
    opened = engine[0].engine
    memory = opened.manifest["memory"]
    decode, prefill, of_one, of_two = memory["activations"]
    assert 0 < of_one < of_two <= decode <= prefill
    assert opened.activation_bytes(2) == prefill == 2 * opened.activation_bytes(1)
    assert opened.streaming_scratch_bytes == 2 * memory["largest_weight"]


def test_the_manifest_tells_the_structure_of_the_graph(engine, package):
    told = engine[0].engine.manifest["package"]
    assert told["structure"] == structure_digest(load_graph(open_package(package)))
    assert told["sha256"] == open_package(package).digest


def test_sizes_to_tune_for_limits_and_debug_tensors_are_recorded(package, tmp_path, configured):
    engine = build(
        package,
        tmp_path / "engine",
        max_batch=4,
        max_seq=256,
        chunk=16,
        opt_batch=3,
        opt_context=250,
        workspace=64 << 20,
        tactic_shared_memory=48 << 10,
        kernel_specialization="EAGER",
        debug_tensors=("model.layers.1/Add*", "model.norm/RMS*"),
    ).engine
    opened = open_engine(engine.path)
    decode, prefill, _, of_three, of_four = opened.profiles
    assert of_three["shapes"]["input_ids"] == [[3, 1]] * 3 and of_four["shapes"]["input_ids"] == [[4, 1]] * 3
    assert decode["shapes"]["input_ids"] == [[1, 1], [3, 1], [4, 1]]
    assert prefill["shapes"]["input_ids"] == [[1, 1], [3, 16], [4, 16]]
    assert all(each["shapes"]["kv_range"] == [[256], [256], [512]] for each in opened.profiles)
    assert decode["shapes"]["past_key_0"] == [[1, 2, 512, 16], [3, 2, 512, 16], [4, 2, 512, 16]]
    assert opened.manifest["limits"] == {"workspace": 64 << 20, "tactic_shared_memory": 48 << 10}
    assert [each[3:] for each in configured] == [(64 << 20, 48 << 10)] * 3
    assert opened.manifest["runtime"] == {"kernel_specialization": "EAGER"}
    assert opened.debug_tensors == ["model.layers.1/Add", "model.layers.1/Add_2", "model.norm/RMSNormalization"]


def test_a_timing_cache_is_written_and_read_again(package, tmp_path, monkeypatch):
    trt, given = choose("rtx").module, []
    create = trt.IBuilderConfig.create_timing_cache
    monkeypatch.setattr(
        trt.IBuilderConfig,
        "create_timing_cache",
        lambda config, content: given.append(bytes(content)) or create(config, content),
    )
    cache = tmp_path / "below" / "timing"
    for turn in range(2):
        build(package, tmp_path / f"engine{turn}", max_seq=32, chunk=8, timing_cache=cache)
        given.append(cache.read_bytes())
    *_, first, written = given[: (half := len(given) // 2)]
    *_, second, again = given[half:]
    assert first == b"" and second == written and len(written) > 16 and len(again) >= len(written)
    assert os.listdir(cache.parent) == ["timing"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no cache" * 100), "is no timing cache of this TensorRT and GPU: remove it"),
        (lambda path: path.write_bytes(b"p"), "is no timing cache of this TensorRT and GPU: remove it"),
        (lambda path: path.mkdir(), "cannot read --timing-cache .*: Is a directory"),
    ],
)
def test_what_is_no_timing_cache_is_refused(package, tmp_path, make, message):
    make(tmp_path / "timing")
    before = (tmp_path / "timing").stat()
    _fails(message, package, tmp_path, max_seq=32, chunk=8, timing_cache=tmp_path / "timing")
    after = (tmp_path / "timing").stat()  # what somebody named by mistake is still there
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"flavor": "fat"}, "no TensorRT flavor 'fat': choose auto, rtx, tensorrt, lean or dispatch"),
        ({"flavor": "rtx==0.1"}, "TensorRT flavor rtx==0.1: .* is installed: install it with"),
        ({"refit": "some"}, "--refit should be identical or any, but is 'some'"),
        ({"refit": True}, "--refit should be identical or any, but is True"),
        ({"version_compatible": True}, "TensorRT rtx .* cannot do --version-compatible: leave it out"),
        ({"kernel_specialization": "FAST"}, "--kernel-specialization should be LAZY, EAGER, NONE, but is 'FAST'"),
        ({"workspace": 0}, "--workspace should be an integer from 1"),
        ({"tactic_shared_memory": 1.5}, "--tactic-shared-memory should be an integer from 1 to .*, but is 1.5"),
        ({"opt_batch": 2}, "--opt-batch should be an integer from 1 to 1, but is 2"),
        ({"opt_context": 33, "max_seq": 32}, "--opt-context should be an integer from 1 to 32, but is 33"),
        (
            {"debug_tensors": ("model.norm*", "x*")},
            r"no tensor that the graph computes is named like 'x\*': names are as",
        ),
        ({"max_seq": 257}, "--max-seq should be an integer from 1 to 256, but is 257"),
        ({"max_batch": 0}, "--max-batch should be an integer from 1"),
        ({"chunk": True}, "--chunk should be an integer"),
        ({"compute_capabilities": ("9.9",)}, "does not build for compute capability 9.9: take 7.5, 8.0"),
    ],
)
def test_wrong_options_are_told_at_once(package, tmp_path, options, message):
    _fails(message, package, tmp_path, **options)


@CPU_ONLY
@pytest.mark.parametrize(
    "options, message",
    [
        ({"strip": True}, "--strip needs an NVIDIA GPU.*no NVIDIA driver"),
        ({"refit": "identical"}, "--refit needs an NVIDIA GPU where the engine is built, but no NVIDIA driver"),
        ({"refit": "any"}, "--refit needs an NVIDIA GPU"),
        ({"strip": True, "refit": "any"}, "--strip needs an NVIDIA GPU"),
        ({"compute_capabilities": ("current",)}, "--compute-capability current needs an NVIDIA GPU"),
    ],
)
def test_what_needs_a_gpu_says_so(package, tmp_path, options, message):
    _fails(message, package, tmp_path, **options)


def _fake_tensorrt(monkeypatch, **changes):
    """`tensorrt`: RTX's module, but bound to a GPU; ``changes`` replace members of the module."""
    flavor = choose("rtx")
    module = types.SimpleNamespace(**vars(flavor.module) | changes)
    fake = dataclasses.replace(
        flavor,
        name="tensorrt",
        version="11.4",
        module=module,
        capabilities=flavor.capabilities - {"builds_without_gpu"},
    )
    monkeypatch.setattr(building, "choose", lambda name: fake)


def test_a_tensorrt_that_builds_for_the_gpu_at_hand_needs_one(package, tmp_path, monkeypatch):
    _fake_tensorrt(monkeypatch)
    monkeypatch.setattr(building, "find_gpus", lambda: Gpus((), problem="the driver sleeps"))
    _fails(
        "TensorRT tensorrt 11.4 builds only where there is an NVIDIA GPU, but the driver sleeps: .* --flavor rtx",
        package,
        tmp_path,
    )


@pytest.mark.parametrize("reason", ["CUDA initialization failure with error: 35", ""])
def test_a_builder_that_does_not_start_says_why(package, tmp_path, monkeypatch, reason):
    def builder(logger):
        if reason:
            logger.log(choose("rtx").module.ILogger.Severity.ERROR, reason)
        raise TypeError("pybind11::init(): factory function returned nullptr")

    _fake_tensorrt(monkeypatch, Builder=builder)
    monkeypatch.setattr(building, "find_gpus", lambda: Gpus(()))
    said = reason or r"pybind11::init\(\): factory function returned nullptr"
    _fails(rf"TensorRT tensorrt 11\.4 does not start \({said}\): see `llmtrt doctor`", package, tmp_path)


def test_an_output_that_exists_stays(package, tmp_path):
    (tmp_path / "engine").mkdir()
    with pytest.raises(UserError, match="exists already"):
        build(package, tmp_path / "engine")
    assert os.listdir(tmp_path) == ["engine"]


@pytest.fixture
def unlinted(monkeypatch):
    """The linter would name these graphs' faults before TensorRT sees them."""
    monkeypatch.setattr("llmtrt.graph.lint.lint_model", lambda *_, **__: [])


def test_a_graph_that_breaks_a_rule_is_refused_before_tensorrt_starts(package, tmp_path):
    changed, name = _changed(package, tmp_path, _softcap)
    _fails(
        rf"model\.onnx: {name} \(Attention\) breaks the rule attention-softcap: .*; write the scores out as [^;]*$",
        changed,
        tmp_path,
    )


def test_a_lowered_graph_that_breaks_a_rule_is_refused_before_tensorrt_starts(tmp_path, monkeypatch):
    quantize(families.save("llama-gqa-tied", tmp_path / "checkpoint"), tmp_path / "package", "fp16")
    monkeypatch.setattr(lowerings, "LOWERINGS", lowerings.LOWERINGS[:1])  # leaves attention with head dim 8 as it is
    _fails("breaks the rule attention-no-dedicated-kernel: .* more\\)$", tmp_path / "package", tmp_path)


def _softcap(model):
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    node.attribute.append(onnx.helper.make_attribute("softcap", 20.0))
    return node.name


def _cut(model):
    node = model.graph.node[10]
    node.input[0] = "nowhere"
    return rf"{node.name} \({node.op_type}\) breaks the rule onnx-checker: its input 'nowhere'"


def _other_operator(model):
    model.graph.node[10].op_type = "Det"
    return f"the graph breaks the rule onnx-checker: .*Det, node name: {model.graph.node[10].name}"


@pytest.mark.parametrize("change", [_cut, _other_operator])
def test_a_damaged_graph_is_one_sentence_about_the_node_at_fault(package, tmp_path, change):
    """In a process of its own: pytest's handlers hide what libraries log to stderr."""
    changed, message = _changed(package, tmp_path, change)
    _fails(rf"model\.onnx: {message}", changed, tmp_path)
    ran = subprocess.run(
        [sys.executable, "-m", "llmtrt", "build", changed, "-o", tmp_path / "never"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1), ran.stderr
    assert ran.stderr.startswith("llmtrt build: error: ") and len(ran.stderr) < 600


def test_a_node_that_the_parser_refuses_is_named(package, tmp_path, unlinted, monkeypatch):
    monkeypatch.setattr(lowerings, "LOWERINGS", lowerings.LOWERINGS[:1])  # split_attention would refuse it
    changed, name = _changed(package, tmp_path, _softcap)
    _fails(rf"refuses node '{name}' \(Attention\): .*\[[A-Z_]+\]$", changed, tmp_path)


def _refused(nodes, functions=()):
    """What parse says of a model of float a [2] → b [2]."""
    flavor = choose("rtx")
    logger = make_logger(flavor)
    builder = flavor.module.Builder(logger)
    network = builder.create_network(1 << int(flavor.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "ab"]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("local", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=opsets, functions=functions
    )
    with pytest.raises(UserError) as caught:
        parse(flavor, network, model.SerializeToString(), Path("model.onnx"), logger)
    return str(caught.value).partition(" refuses ")[2]


def _function(name, *nodes):
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["x"], ["y"], list(nodes), opsets)


@pytest.mark.parametrize(("name", "said"), [("bad", "node 'bad'"), (None, "an unnamed node")])
def test_a_refused_node_in_local_functions_is_found_by_their_calls(name, said):
    inner = _function("Inner", helper.make_node("Bernoulli", ["x"], ["y"], name=name))
    outer = _function("Outer", helper.make_node("Inner", ["x"], ["y"], name="call_inner", domain="local"))
    nodes = [helper.make_node("Outer", ["a"], ["b"], name="call_outer", domain="local")]
    assert _refused(nodes, [inner, outer]) == (
        f"{said} (Bernoulli) in call_inner (Inner) in call_outer (Outer): TensorRT has no importer for this operator "
        "(checkBernoulli) [UNSUPPORTED_NODE]"
    )


def test_a_refused_node_without_a_name_is_counted():
    nodes = [helper.make_node("Abs", ["a"], ["c"]), helper.make_node("Abs", ["nowhere"], ["b"])]
    assert _refused(nodes).startswith("node #1 (Abs): ") and _refused(nodes).endswith(" [INVALID_GRAPH]")


def _tensor(location):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def _in_subgraph(model, tensor):
    output = [helper.make_tensor_value_info("w", TensorProto.FLOAT, [1])]
    branch = helper.make_graph([], "branch", [], output, [tensor])
    model.graph.node.append(helper.make_node("If", ["c"], ["u"], then_branch=branch, else_branch=branch))


def _in_attribute(model, tensor):
    model.graph.node.append(helper.make_node("Constant", [], ["w"], value=tensor))


def _in_function(model, tensor):
    model.functions.append(_function("F", helper.make_node("Constant", [], ["y"], value=tensor)))


@pytest.mark.parametrize("place", [_in_subgraph, _in_attribute, _in_function])
def test_no_tensor_anywhere_reaches_outside(package, tmp_path, place):
    changed, _ = _changed(package, tmp_path, lambda model: place(model, _tensor("../secret")))
    _fails("'../secret' is not a plain file name", changed, tmp_path)
    shutil.rmtree(changed)
    changed, _ = _changed(package, tmp_path, lambda model: place(model, _tensor("unlisted")))
    _fails("lies in unlisted, which the manifest does not list", changed, tmp_path)


def test_a_graph_that_is_not_onnx_or_reaches_outside_is_refused(package, tmp_path):
    def reach_out(model):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../secret"

    changed, _ = _changed(package, tmp_path, reach_out)
    _fails("'../secret' is not a plain file name", changed, tmp_path)
    (changed / "model.onnx").write_bytes(b"\xff" * 100)
    _fails("not a readable ONNX model", changed, tmp_path, verify=False)


def test_a_failed_compilation_says_why(tmp_path, monkeypatch, unlinted):
    quantize(families.save("llama-gqa-tied", tmp_path / "checkpoint"), tmp_path / "package", "fp16")
    monkeypatch.setattr(lowerings, "LOWERINGS", lowerings.LOWERINGS[:1])  # leaves attention with head dim 8 as it is
    _fails("could not build .*: .*not supported by a dedicated kernel", tmp_path / "package", tmp_path)


def test_ctrl_c_says_that_it_stops_and_leaves_nothing(package, tmp_path):
    notes = []

    def interrupt(done, total, note=""):
        notes.append(note)
        if note == "Optimizing graph" and notes.count(note) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(package, tmp_path / "engine", max_seq=32, chunk=8, report=interrupt)
    assert os.listdir(tmp_path) == []
    assert notes.count("stopping…") == 1 and notes[-1] == "stopping…"


def test_a_cancelled_monitor_says_so_once_and_ends_the_build_at_its_next_step():
    notes = []
    monitor = make_monitor(choose("rtx"), lambda done, total, note="": notes.append((done, total, note)))
    monitor.phase_start("Building", None, 3)
    assert monitor.step_complete("Building", 0)
    monitor.cancel()
    monitor.phase_start("Optimizing graph", "Building", 5)
    assert not monitor.step_complete("Optimizing graph", 0) and not monitor.step_complete("Building", 1)
    monitor.cancel()
    assert notes == [(0, 3, "Building"), (1, 3, "Building"), (1, 3, "stopping…")]


def test_what_a_report_raises_comes_through(package, tmp_path):
    def fail(done, total, note=""):
        raise ZeroDivisionError("in the caller's own code")

    with pytest.raises(ZeroDivisionError):
        build(package, tmp_path / "engine", max_seq=32, chunk=8, report=fail)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_told(package, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(building, "choose", _limited(building.choose, resource))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match="cannot write .*engine: File too large"):
            build(package, tmp_path / "engine", max_seq=32, chunk=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def _limited(function, resource):
    def limited(*arguments):
        result = function(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return result

    return limited


@pytest.mark.parametrize("asked, tuned", [({}, 768), ({"opt_context": 300}, 512)])
def test_contexts_are_tuned_for_in_whole_steps(tmp_path, asked, tuned):
    checkpoint = families.save("llama-even", tmp_path / "checkpoint", max_position_embeddings=4096)
    package = quantize(checkpoint, tmp_path / "package", "fp16").package
    engine = build(package.path, tmp_path / "engine", max_seq=600, chunk=64, **asked).engine
    assert [each["shapes"]["kv_range"] for each in engine.profiles] == [[[256], [tuned], [768]]] * 2


@pytest.mark.parametrize("recipe, weights", [("fp16", "plan"), ("int4", "plan"), ("int4", "both"), ("int4", "inputs")])
def test_prefill_of_known_sizes_has_kernels_of_its_own(tmp_path, recipe, weights):
    """Where TensorRT multiplies matrices of fp16; and where one row has a plan, no other decodes one sequence."""
    checkpoint = families.save("llama-even", tmp_path / "checkpoint", max_position_embeddings=4096)
    package = quantize(checkpoint, tmp_path / "package", recipe).package
    engine = build(package.path, tmp_path / "engine", max_seq=1030, chunk=1024, weights=weights).engine
    names = [profile["name"] for profile in open_engine(engine.path).profiles]
    sizes = [512, 1024] if recipe == "fp16" or weights == "inputs" else []
    assert names == ["decode"] * (weights == "plan") + ["prefill"] + [f"prefill, {size} rows" for size in sizes]
    for size, profile in zip(reversed(sizes), reversed(engine.profiles)):
        assert profile["shapes"]["input_ids"] == [[1, size]] * 3 and profile["shapes"]["logits_index"] == [[1, 1]] * 3
        assert profile["shapes"]["kv_range"][0] != profile["shapes"]["kv_range"][2]
    # Each profile's schedule, the head's but for itself: whether products' kernels are chosen when sizes are known.
    chosen = [b"runtime_tactic=true" not in main for main in engine.plan.read_bytes().split(b"\nmain {")[1:]]
    assert sum(chosen) == len(chosen) // len(names) * len(sizes) or not sizes


def test_contexts_past_what_tensorrts_attention_of_one_row_takes_are_built(tmp_path):
    """From 24,576 rows of cache less the head dimension on, it has no kernel for a decode profile of one row."""
    checkpoint = families.save("llama-even", tmp_path / "checkpoint", max_position_embeddings=65536)
    package = quantize(checkpoint, tmp_path / "package", "fp16").package
    engine = build(package.path, tmp_path / "engine", max_seq=65536, chunk=512).engine
    assert engine.profiles[0]["shapes"]["input_ids"] == [[1, 1]] * 3 and engine.capacity == 66048


def hold_one_row(activations: object):
    def change(manifest: dict) -> None:
        manifest["files"]["decode.plan"] = {"bytes": 1, "sha256": "0" * 64}
        manifest["one_row"] = {"activations": activations}

    return change


def hold_weights(extent: list):
    def change(manifest: dict) -> None:
        manifest["files"]["weights.bin"] = {"bytes": 4999, "sha256": "0" * 64}
        manifest["weight_inputs"] = {"w": extent}

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format_version=99), "format version 99, this llmtrt reads 8"),
        (lambda m: m.update(format="llmtrt-package"), "expected format 'llmtrt-engine', found 'llmtrt-package'"),
        (lambda m: m.update(format="other"), "not an engine's manifest"),
        (lambda m: m.update(capacity=-1), "capacity should be a positive integer, but is -1"),
        (lambda m: m.update(capacity=70), r"capacity 70 is less than max_seq 64 \+ chunk 16"),
        (lambda m: m.update(flavor={"name": 3}), "debug_tensors and runtime should hold names"),
        (lambda m: m.update(flags=["STRIP_PLAN", 1]), "debug_tensors and runtime should hold names"),
        (lambda m: m["runtime"].update(kernel_specialization=[]), "debug_tensors and runtime should hold names"),
        (lambda m: m.update(flags=["REFIT_INDIVIDUAL"]), "'files' should list graph.onnx"),
        (lambda m: m.pop("profiles"), "'profiles' should be a JSON array"),
        (lambda m: m["profiles"][2]["shapes"].pop("input_ids"), "'profiles' should hold names and shapes of input_ids"),
        (lambda m: m["profiles"][2].pop("name"), "'profiles' should hold names and shapes of input_ids"),
        (lambda m: m["profiles"][0].update(name="other"), "'profiles' should hold one named 'decode'"),
        (
            lambda m: m["profiles"][2]["shapes"].update(input_ids=[[1], [1], [1]]),
            "'profiles' should hold names and shapes of input",
        ),
        (lambda m: m["files"].pop("engine.plan"), "'files' should list engine.plan"),
        (lambda m: m["files"].pop("greedy.plan"), "'files' should list greedy.plan"),
        (lambda m: m.update(one_row=[1]), "'one_row' should be a JSON object or null"),
        (lambda m: m.pop("one_row"), "'one_row' should be a JSON object or null"),
        (lambda m: m.update(one_row={"profile": {}}), "'files' should list decode.plan"),
        (hold_one_row("abc"), "'memory' should hold sizes in bytes"),
        (hold_one_row([-1]), "'memory' should hold sizes in bytes"),
        (lambda m: m.update(weight_inputs={"w": [0, 1]}), "'files' should list weights.bin"),
        (hold_weights([0, 5000]), "w should lie in the 4999 bytes of weights.bin, but has 5000 from 0 on"),
        (hold_weights([3, 5]), "w should lie in the 4999 bytes of weights.bin, but has 5 from 3 on"),
        (lambda m: m.pop("runtime"), "'runtime' should be a JSON object"),
        (lambda m: m.update(debug_tensors={}), "'debug_tensors' should be a JSON array"),
        (lambda m: m["memory"].update(activations=[]), "'memory' should hold sizes in bytes"),
        (lambda m: m["memory"].update(activations=[1, "2"]), "'memory' should hold sizes in bytes"),
        (lambda m: m["memory"].update(weights=-1), "'memory' should hold sizes in bytes"),
        (lambda m: m["memory"].pop("largest_weight"), "'memory' should hold sizes in bytes"),
        (lambda m: m["model"].update(layers="many"), "model.layers should be a positive integer"),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0"}}), "'../x' is not a plain file name"),
    ],
)
def test_a_corrupt_manifest_is_refused(engine, tmp_path, change, message):
    folder = shutil.copytree(engine[0].engine.path, tmp_path / "engine")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    files.write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError, match=message):
        open_engine(folder)


def test_a_flipped_bit_and_a_truncated_plan_are_found(engine, tmp_path):
    folder = shutil.copytree(engine[0].engine.path, tmp_path / "engine")
    plan = bytearray((folder / "engine.plan").read_bytes())
    plan[len(plan) // 2] ^= 4
    (folder / "engine.plan").write_bytes(plan)
    with pytest.raises(UserError, match="engine.plan is corrupt"):
        open_engine(folder)
    (folder / "engine.plan").write_bytes(plan[:-1])
    with pytest.raises(UserError, match=f"engine.plan has {len(plan) - 1} bytes instead of {len(plan)}"):
        open_engine(folder)


@CPU_ONLY
def test_running_an_engine_without_a_gpu_says_so(engine):
    from llmtrt.runtime.tensorrt import TrtSession

    with pytest.raises(UserError, match="needs an NVIDIA GPU, but no NVIDIA driver"):
        TrtSession(engine[0].engine)


def _fails(message, package, tmp_path, **options):
    """The build raises that sentence and leaves nothing of its output."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        build(package, tmp_path / "never", **options)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def _changed(package, tmp_path, change):
    """A copy of the package with its graph changed and its digests right."""
    folder = shutil.copytree(package, tmp_path / "changed")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    result = change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = files.digest_file(folder / "model.onnx")
    files.write_json(folder / "manifest.json", manifest)
    return folder, result


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama-rope-llama3", Recipe(group_size=16, embedding="int4", lm_head="int4")),
        ("mistral-sliding", Recipe(group_size=16)),
        ("qwen2-tied", Recipe(group_size=16, embedding="int8", lm_head="int8")),
        ("qwen3-bias", Recipe(group_size=16, dtype="bfloat16")),
        ("phi3-long", Recipe(group_size=16)),
        ("gemma3", Recipe(algorithm="none")),
    ],
)
def test_every_family_builds(name, recipe, tmp_path):
    quantize(families.save(name, tmp_path / "checkpoint"), tmp_path / "package", recipe)
    built = build(tmp_path / "package", tmp_path / "engine", max_batch=2, max_seq=64, chunk=16)
    assert built.engine.plan.stat().st_size > 10_000
    config = families.reference(name).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    needs = config.num_attention_heads < 4 or head_dim < 16  # FACTS and lint: what has no decode kernel
    assert ("decomposed_attention" in built.engine.manifest["lowerings"]) == needs


@pytest.mark.parametrize("profiles", [decoder_profiles, one_row_profile])
def test_an_input_that_no_profile_knows_is_named(profiles):
    options = BuildOptions(max_seq=40, chunk=8, opt_context=40)
    assert profiles({"kv_range": (-1,)}, options)[0].shapes["kv_range"][2] == (options.capacity,)
    with pytest.raises(UserError, match="an input 'kv_length', which the graph contract does not know"):
        profiles({"kv_range": (-1,), "kv_length": (-1,)}, options)
