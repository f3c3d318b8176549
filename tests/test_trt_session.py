"""TrtSession on a fake GPU (see fake_gpu) against OrtSession: the same numbers through other memory."""

import dataclasses
import os
import re
import shutil
import sys
from types import SimpleNamespace

import fake_gpu
import families
import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx_bindings")

import onnx_ir as ir

from llmtrt.engine.build import build
from llmtrt.engine.gpu import Gpus
from llmtrt.engine.manifest import DECODE, GREEDY, PLAN, SAMPLER, WEIGHTS, open_engine
from llmtrt.errors import CannotRunHere, UserError
from llmtrt.graph.expose import expose
from llmtrt.graph.lowering import Target, lower
from llmtrt.graph.lowerings.weight_inputs import weight_of
from llmtrt.graph.structure import load_graph
from llmtrt.package import open_package
from llmtrt.quantization.pipeline import quantize
from llmtrt.quantization.recipe import Recipe
from llmtrt.runtime import kernel_cache
from llmtrt.runtime import tensorrt as runtime
from llmtrt.runtime.context import Context
from llmtrt.runtime.cuda import Region
from llmtrt.runtime.footprint import RESERVE, predict, room_for_weights
from llmtrt.runtime.kv_cache import aligned
from llmtrt.runtime.onnxruntime import OrtSession
from llmtrt.runtime.params import SamplingParams
from llmtrt.runtime.request import Request
from llmtrt.runtime.sampling import Sampler
from llmtrt.runtime.scheduler import Scheduler
from llmtrt.runtime.session import Decoding, DeviceSession
from llmtrt.runtime.speculation import Draft, Speculation
from llmtrt.runtime.streaming import WeightBudget
from llmtrt.runtime.tensorrt import TrtSession

CHUNK = 8


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    quantize(families.save("mistral", folder / "checkpoint"), folder / "package", "fp32")
    return built_small(folder / "package", folder / "engine")


def built_small(package, output, **options):
    """An engine whose contexts come in steps of 8 rows, so that few tokens take several."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("build", "options", "profiles"):
            patch.setattr(f"llmtrt.engine.{module}.CONTEXT_STEP", 8)
        return build(package, output, max_batch=3, max_seq=40, chunk=CHUNK, **options).engine


@pytest.fixture
def machine(engine, monkeypatch):
    """Replaces GPU, CUDA and TensorRT; ``machine(...)`` again changes what they are. ``free``: what NVML says."""
    monkeypatch.setenv(kernel_cache.FOLDER, "")

    def replace(
        total: int = 1 << 30, version: str | None = None, gpus: Gpus = fake_gpu.GPU, free: int | None = None, **options
    ):
        cuda = fake_gpu.FakeCuda(total)
        trt = fake_gpu.FakeTensorRT(options.pop("engine", engine), cuda, version, **options)
        monkeypatch.setattr(runtime, "find_gpus", lambda: gpus)
        monkeypatch.setattr(runtime, "free_bytes", lambda gpu: free)
        bindings = type(sys)("cuda.bindings")
        bindings.runtime, bindings.driver = cuda, fake_gpu.fake_driver(1 << 40)
        for name, module in (
            ("tensorrt_rtx", trt),
            ("cuda", type(sys)("cuda")),
            ("cuda.bindings", bindings),
            ("cuda.bindings.runtime", cuda),
        ):
            monkeypatch.setitem(sys.modules, name, module)
        return cuda, trt

    return replace


@pytest.fixture
def reference(engine):
    session = OrtSession(open_package(engine.package_path, verify=False), threads=1, accuracy_level=1, chunk=CHUNK)
    yield session
    session.close()


def requests(spec, prompts, params):
    return [
        Request(index, np.array(prompt), each, spec, 40, None, 0.0)
        for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
    ]


def tokens(session, prompts, params):
    """What a scheduler makes of them on ``session``, with the reasons for which each ended."""
    made = requests(session.spec, prompts, params)
    pieces = Scheduler(session).run(made, len(made))
    reasons = {piece.index: piece.finish_reason for piece in pieces if piece.completion}
    return [(request.token_ids, reasons[request.index]) for request in made]


def drive(session, prompts, steps):
    """Prefill of prompts of different lengths in chunks, then greedy decode; the logits of every step."""
    seen, ids = [], [list(prompt) for prompt in prompts]
    lengths = np.array([[len(prompt)] for prompt in prompts])
    session.reserve(len(prompts), int(lengths.max()) + steps)
    for start in range(0, int(lengths.max()), CHUNK):
        rows = min(CHUNK, int(lengths.max()) - start)
        part = np.zeros((len(prompts), rows), np.int64)
        for slot, prompt in enumerate(prompts):
            part[slot, : len(prompt[start : start + rows])] = prompt[start : start + rows]
        index = np.clip(lengths - 1 - start, 0, rows - 1)
        logits = session.step(part, np.minimum(lengths, start) + np.arange(rows), index)
        seen.append(logits)
        for slot in range(len(prompts)):
            if 0 <= lengths[slot, 0] - 1 - start < rows:
                ids[slot].append(int(logits[slot, 0].argmax()))
    for _ in range(steps):
        last = np.array([[tokens[-1]] for tokens in ids])
        logits = session.step(last, np.array([[len(tokens) - 1] for tokens in ids]), np.zeros((len(ids), 1), np.int64))
        seen.append(logits)
        for slot, tokens in enumerate(ids):
            tokens.append(int(logits[slot, 0].argmax()))
    return ids, seen


@pytest.mark.parametrize("smallest", [8, runtime._SMALLEST_CONTEXT])
def test_chunked_batches_equal_onnxruntime(engine, machine, reference, monkeypatch, smallest):
    """With buckets of 8 rows and more, a step that ends at a bucket's last row and one that just needs the next come
    up too."""
    monkeypatch.setattr(runtime, "_SMALLEST_CONTEXT", smallest)
    cuda, trt = machine()
    session = TrtSession(engine)
    assert "Fake GPU" in session.description and "NONE" in session.description
    rng = np.random.default_rng(0)
    for prompts in (
        [rng.integers(0, 97, n) for n in (19, 3, 8)],
        [rng.integers(0, 97, 5)],
        [rng.integers(0, 97, 30)] * 2,
    ):
        ids, logits = drive(session, prompts, 6)
        wanted_ids, wanted = drive(reference, prompts, 6)
        assert ids == wanted_ids
        assert all(np.abs(a - b).max() <= 1e-4 * np.ptp(b) for a, b in zip(logits, wanted, strict=True))
    decode, prefill = trt.runs_of(PLAN), trt.runs_of(PLAN, 1)
    assert {run["input_ids"][1] for run in decode} == {1}
    assert {run["input_ids"][1] for run in prefill} >= {CHUNK}
    ranges = {run["kv_range"][0] for run in decode + prefill}
    assert ranges == ({8, 16, 24, 32, 40} if smallest == 8 else {engine.capacity})
    session.close()
    session.close()
    assert not cuda.live and not cuda.streams


def test_all_rows_of_a_chunk_can_be_wanted(engine, machine, reference):
    cuda, _ = machine()
    session = TrtSession(engine)
    ids, rows = np.random.default_rng(1).integers(0, 97, (2, CHUNK)), np.tile(np.arange(CHUNK), (2, 1))
    for each in (session, reference):
        each.reserve(2, 20)
    first, wanted = session.step(ids, rows, rows), reference.step(ids, rows, rows)
    assert first.shape == (2, CHUNK, 97) and np.abs(first - wanted).max() <= 1e-4 * np.ptp(wanted)
    kept = first.copy()
    session.step(ids, rows + CHUNK, rows)
    assert np.array_equal(first, kept)  # a step's logits are the caller's own
    session.close()
    assert not cuda.live


def step_all(session, rows, wanted, start=0):
    """One step of ``rows`` rows of one sequence from position ``start`` on, with the logits of the last ``wanted``."""
    places = np.arange(rows)[None]
    return session.step(places + start + 5, places + start, places[:, rows - wanted :])


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param(((4, 4), (1, 1), (8, 4), (1, 1)), id="activations grow, logits do not"),
        pytest.param(((8, 2), (1, 1), (4, 4), (1, 1)), id="logits grow, activations do not"),
        pytest.param(((1, 1), (8, 8), (1, 1), (8, 8)), id="both grow"),
    ],
)
def test_buffers_that_grow_are_told_to_both_contexts(engine, machine, reference, monkeypatch, shapes):
    monkeypatch.setattr(runtime, "logit_rows", lambda engine, slots: slots)  # or logits that suffice are taken at once
    machine()
    session = TrtSession(engine)
    for each in (session, reference):
        each.reserve(1, 1)
    session._reserved = 1, 40  # as a chunk of 8 rows would take the activations of all at once
    reference.reserve(1, 40)
    grown, start = [], 0
    for rows, wanted in shapes:
        logits, expected = (step_all(each, rows, wanted, start) for each in (session, reference))
        assert np.abs(logits - expected).max() <= 1e-4 * np.ptp(expected)
        grown.append((session._activations.size, session._host_logits.size))
        start += rows
    assert grown[-1] != grown[0]
    session.close()


def poison(cuda, session):
    """NaN in all of the cache, as a request leaves whose activations overflow."""
    cuda.cudaStreamSynchronize(session._cuda.stream)
    size = session._kv.bytes_for(session._kv.slots)
    np.frombuffer(cuda.inside(session._kv._block, size), np.float32)[:] = np.nan


@pytest.mark.parametrize("slots", [1, 3])
def test_nan_of_an_earlier_request_reaches_no_later_one(engine, machine, reference, monkeypatch, slots):
    monkeypatch.setattr(runtime, "_SMALLEST_CONTEXT", 8)
    cuda, _ = machine()
    session = TrtSession(engine)
    session.reserve(3, 40)
    prompts = [np.random.default_rng(2).integers(0, 97, 19)] * slots
    wanted_ids, wanted = drive(reference, prompts, 6)
    for _ in range(2):
        poison(cuda, session)
        ids, logits = drive(session, prompts, 6)  # reserves 25 tokens
        assert ids == wanted_ids
        assert all(np.abs(a - b).max() <= 1e-4 * np.ptp(b) for a, b in zip(logits, wanted, strict=True))
    one = np.zeros((slots, 1), np.int64)
    assert np.isfinite(session.step(one, one + 25 + CHUNK - 1, one)).all()  # the last row that was reserved
    session.close()


def test_a_step_beyond_what_was_reserved_is_an_error_and_not_a_lost_row(engine, machine):
    machine()
    session = TrtSession(engine)
    session.reserve(1, 10)
    one = np.zeros((1, 1), np.int64)
    with pytest.raises(ValueError, match="more than what was reserved"):
        session.step(one, one + 10 + CHUNK, one)
    session.step(one, one + 10 + CHUNK - 1, one)
    with pytest.raises(ValueError, match="more than what was reserved"):
        session.step(np.zeros((2, 1), np.int64), np.zeros((2, 1), np.int64), np.zeros((2, 1), np.int64))
    session.reserve(3, 40)
    session.reserve(1, 10)
    with pytest.raises(ValueError, match="more than what was reserved"):
        session.step(np.zeros((2, 1), np.int64), np.zeros((2, 1), np.int64), np.zeros((2, 1), np.int64))
    session.close()
    with pytest.raises(UserError, match="is closed"):
        session.reserve(1, 10)


def test_more_than_the_engine_holds_is_refused(engine, machine):
    machine()
    session = TrtSession(engine)
    with pytest.raises(UserError, match="runs 3 sequences at a time, not 4.*--max-batch 4"):
        session.reserve(4, 10)
    with pytest.raises(UserError, match="built for 40 tokens, not 41.*--max-seq 41"):
        session.reserve(1, 41)
    session.close()


def test_a_failed_load_leaves_no_memory_behind(engine, machine, monkeypatch):
    cuda, _ = machine()
    monkeypatch.setattr(runtime, "KvCache", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TrtSession(engine)
    assert not cuda.live and not cuda.streams


def test_tensorrt_goes_before_what_it_uses(engine, machine):
    """Graphs, contexts, engines, runtime; then events, the memory and the stream that they were given."""
    cuda, trt = machine()
    session = TrtSession(engine)
    assert tokens(session, [[5, 9, 2]], [SamplingParams(max_tokens=4)])
    contexts = len(trt.contexts)
    cuda.ended.clear()
    session.close()
    assert contexts == 4  # prefill, decode and the two samplers
    assert cuda.ended[:9] == ["graph"] + ["context"] * 4 + ["engine"] * 3 + ["runtime"]
    assert cuda.ended[9:11] == ["event"] * 2 and {*cuda.ended[11:-1]} == {"memory"} and cuda.ended[-1] == "stream"
    assert not cuda.live and not cuda.events and not cuda.executables and not cuda.graphs


def test_a_cache_that_is_not_updated_in_place_is_refused(engine, machine, monkeypatch):
    cuda, _ = machine()
    monkeypatch.setattr(fake_gpu.FakeEngine, "get_aliased_input_tensor", lambda self, name: None)
    with pytest.raises(UserError, match="updated in place: build the engine anew"):
        TrtSession(engine)
    assert not cuda.live and not cuda.streams


@pytest.fixture
def stripped(engine, tmp_path):
    """The engine as if it had been built with --strip."""
    folder = shutil.copytree(engine.path, tmp_path / "stripped")
    shutil.copyfile(engine.package_path / "model.onnx", folder / "graph.onnx")
    manifest = engine.manifest | {"flags": ["REFIT_IDENTICAL", "STRIP_PLAN"]}
    return dataclasses.replace(engine, path=folder, manifest=manifest)


def refitting(trt, left_out=(), works=True):
    """Gives ``trt`` the two classes that refit; returns the list of their calls."""
    calls = []

    class Refitter:
        def __init__(self, engine, logger):
            assert engine.num_io_tensors

        def get_missing_weights(self):
            return list(left_out)

        def refit_cuda_engine(self):
            calls.append("refit_cuda_engine")
            return works

    class OnnxParserRefitter:
        num_errors = 0

        def __init__(self, refitter, logger):
            assert isinstance(refitter, Refitter)

        def refit_from_bytes(self, model, path):
            calls.append((model, path))
            return True

    trt.Refitter, trt.OnnxParserRefitter = Refitter, OnnxParserRefitter
    return calls


def test_a_plan_without_weights_is_filled_from_its_package(stripped, machine, reference):
    cuda, trt = machine()
    calls = refitting(trt)
    session = TrtSession(stripped)
    graph = (stripped.path / "graph.onnx").read_bytes()
    assert calls == [(graph, str(stripped.package_path / "model.onnx")), "refit_cuda_engine"]
    prompts = [[5, 9, 2]]
    for ours, wanted in zip(drive(session, prompts, 2), drive(reference, prompts, 2)):
        assert np.array_equal(ours, wanted)
    session.close()


@pytest.fixture(scope="module", params=["inputs", "both"])
def with_inputs(request, tmp_path_factory):
    """An engine of an INT4 package whose plans, or the one for steps of one row, take weights as inputs."""
    folder = tmp_path_factory.mktemp("inputs")
    recipe = Recipe("rtn", 64, "float32", embedding="int8", lm_head="int8")
    quantize(families.save("llama-even", folder / "checkpoint"), folder / "package", recipe)
    options = {"max_batch": 3, "max_seq": 40, "chunk": CHUNK, "weights": request.param}
    return build(folder / "package", folder / "engine", **options).engine


def test_weights_are_bound_where_they_were_copied_to(with_inputs, machine):
    package = open_package(with_inputs.package_path)
    expected = OrtSession(package, threads=1, accuracy_level=1, chunk=CHUNK)
    cuda, trt = machine(engine=with_inputs)
    session = TrtSession(with_inputs)
    for name, params in ASKED.items():
        assert tokens(session, PROMPTS, params) == tokens(expected, PROMPTS, params), name
    together, alone = ({shapes["input_ids"] for shapes in trt.runs_of(plan)} for plan in (PLAN, DECODE))
    assert together >= {(2, 1), (3, 1)} and alone == {(1, 1)} and (1, 1) not in together
    whole = sum(length for _, length in with_inputs.weight_inputs.values())
    assert with_inputs.step_weight_bytes(1) == whole
    shared = "weight_inputs" in with_inputs.manifest["lowerings"]
    assert with_inputs.step_weight_bytes(2) == (whole if shared else with_inputs.weight_bytes - whole)
    assert session.memory().measured.weights >= whole
    assert session.memory().predicted.weights == with_inputs.weight_bytes >= whole
    session.close()
    assert not cuda.live
    with pytest.raises(UserError, match="has its weights beside the plan and takes no others"):
        TrtSession(with_inputs, package=package)
    assert not cuda.live


def test_activations_are_those_of_a_layer_where_weights_are_unpacked(with_inputs):
    """Or of the head, where that is larger."""
    manifest, layers = with_inputs.manifest, with_inputs.spec.layers
    said, of_one_row = max(manifest["memory"]["activations"]), max(manifest["one_row"]["activations"])
    if "weight_inputs" not in manifest["lowerings"]:
        expected = [max(said * slots // 3, of_one_row) for slots in (1, 2)]
        assert [with_inputs.activation_bytes(slots) for slots in (1, 2)] == expected
        return
    assert (
        with_inputs.activation_bytes(1) == with_inputs.activation_bytes(2) == max(said // layers * 5 // 4, of_one_row)
    )
    head = 1 << 20
    weights = manifest["weight_inputs"] | {
        "lm_head.weight.bytes": [0, head],
        "model.embed_tokens.weight": [0, 9 * head],
    }
    memory = manifest["memory"] | {"activations": [said, 100 * head]}
    larger = dataclasses.replace(with_inputs, manifest=manifest | {"weight_inputs": weights, "memory": memory})
    assert larger.activation_bytes(1) == 100 * head // layers * 5 // 4
    memory["activations"] = [said, 6 * head]
    assert larger.activation_bytes(1) == max(4 * head * 5 // 4, of_one_row)  # of fp32


def test_what_lies_beside_the_plans_is_what_their_graphs_take(with_inputs):
    canonical, capacity = load_graph(open_package(with_inputs.package_path)), with_inputs.capacity
    content, taken = (with_inputs.path / WEIGHTS).read_bytes(), with_inputs.weight_inputs
    for one_row in (True, False):
        model, _ = lower(canonical, Target("rtx", frozenset(), capacity, "inputs", one_row))
        given = {value.name: weight_of(value) for value in model.graph.inputs if weight_of(value) is not None}
        assert given.keys() == taken.keys() and len(given) == 3 * 4 * 3 + 2 + 2  # q, k, v together, and gate and up
        for name, weight in given.items():
            start, length = taken[name]
            assert start % 4096 == 0 and content[start : start + length] == weight.tobytes()
    assert taken.keys() >= {"model.layers.1.mlp.gate_proj.weight+model.layers.1.mlp.up_proj.weight.bytes"}


def test_weights_that_are_not_there_are_told(with_inputs, machine, tmp_path):
    machine(engine=with_inputs)
    folder = shutil.copytree(with_inputs.path, tmp_path / "engine")
    os.truncate(folder / WEIGHTS, 1000)
    with pytest.raises(UserError, match=r"weights.bin has 1000 bytes instead of"):
        open_engine(folder)
    with pytest.raises(UserError, match=r"weights.bin ends before the weight .*make it anew"):
        TrtSession(open_engine(folder, verify=False))
    fewer = dict(with_inputs.manifest["weight_inputs"])
    missing = fewer.popitem()[0]
    manifest = with_inputs.manifest | {"weight_inputs": fewer}
    cuda, _ = machine(engine=with_inputs)
    with pytest.raises(
        UserError, match=f"a plan takes .* bytes of {re.escape(missing)} that the manifest does not have"
    ):
        TrtSession(dataclasses.replace(with_inputs, manifest=manifest))
    assert not cuda.live
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"weights.bin"):
        open_engine(folder)


def test_a_plan_that_cannot_be_filled_says_why(stripped, machine):
    cuda, trt = machine()
    with pytest.raises(UserError, match="holds no weights, and the package .* put it back there"):
        TrtSession(dataclasses.replace(stripped, package_path=None))
    refitting(trt, left_out=["a.weight", "b.weight", "c.weight"])
    with pytest.raises(
        UserError, match="could not be filled from .*nothing was given for a.weight, b.weight, c.weight"
    ):
        TrtSession(stripped)
    refitting(trt, works=False)
    with pytest.raises(UserError, match="could not be filled from .*TensorRT gives no reason"):
        TrtSession(stripped)
    assert not cuda.live and not cuda.streams


def test_a_runtime_that_does_not_start_says_why(engine, machine):
    cuda, trt = machine()

    class Runtime:
        def __init__(self, logger):
            if self.reason:
                logger.log(1, self.reason)
            raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.Runtime = Runtime
    for Runtime.reason, match in (("CUDA initialization failure with error: 35", "error: 35"), ("", "nullptr")):
        with pytest.raises(CannotRunHere, match=rf"TensorRT rtx .* does not start \(.*{match}\): `llmtrt doctor`"):
            TrtSession(engine)
        assert not cuda.live and not cuda.streams
    Runtime.reason = "Error Code 1: Cuda Runtime (cudaError 2: out of memory)"
    with pytest.raises(UserError, match="does not start .*out of memory.*: close other programs") as told:
        TrtSession(engine)
    assert told.type is UserError


def test_what_tensorrt_refuses_is_an_error_with_its_reason(engine, machine, monkeypatch):
    """The latest one, not what it complained of before."""
    machine()
    session = TrtSession(engine)
    session.reserve(1, 20)
    log = session._logger.log
    for name in ("set_tensor_address", "set_input_shape", "execute_async_v3"):
        log(1, "an old complaint")
        if name == "execute_async_v3":
            step_all(session, 2, 2)  # from here on the contexts are prepared
            log(1, "an old complaint")
        else:
            for context in session._contexts.values():
                context.state = context.shapes = None
        with monkeypatch.context() as patch:
            patch.setattr(fake_gpu.FakeContext, name, lambda *_: log(1, "out of cheese"))
            with pytest.raises(RuntimeError, match="^TensorRT .*out of cheese$"):
                step_all(session, 2, 2)
    assert np.isfinite(step_all(session, 2, 2)).all()
    session.close()


def test_a_step_that_the_gpu_has_no_room_for_is_the_users_to_mend(engine, machine, monkeypatch):
    """As TensorRT says where it loads a kernel in a step and the memory has gone meanwhile."""
    machine()
    session = TrtSession(engine)
    session.reserve(1, 20)
    said = "[defaultAllocator.cpp::allocateAsync::48] Error Code 1: Cuda Runtime (cudaError 2: out of memory)"
    monkeypatch.setattr(fake_gpu.FakeContext, "execute_async_v3", lambda *_: session._logger.log(1, said))
    with pytest.raises(UserError, match=r"no room for what a step needs .*out of memory.*: close other programs"):
        step_all(session, 2, 2)
    session.close()


def test_an_engine_that_does_not_fit_says_what_does_not(engine, machine, tmp_path, monkeypatch):
    output = tmp_path / "targeted"
    targeted = build(engine.package_path, output, max_seq=16, chunk=8, compute_capabilities=("12.0",)).engine
    machine(version="1.7.1.116")
    with pytest.raises(
        UserError,  # where both are installed, another process could
        match=rf"built with TensorRT rtx {engine.flavor_version} and 1\.7\.1\.116 is installed"
        rf"|TensorRT rtx {engine.flavor_version} cannot be used in this process, which has imported 1\.7\.1\.116",
    ):
        TrtSession(engine)
    machine(gpus=Gpus((), problem="the NVIDIA driver sees no GPU"))
    with pytest.raises(CannotRunHere, match="needs an NVIDIA GPU, but the NVIDIA driver sees no GPU"):
        TrtSession(engine)
    machine()
    with pytest.raises(UserError, match="kernel_specialization should be LAZY, EAGER, NONE, but is 'FAST'"):
        TrtSession(engine, kernel_specialization="FAST")
    with pytest.raises(CannotRunHere, match="built for compute capability 12.0, but Fake GPU has 8.9"):
        TrtSession(targeted)
    for content in (b"", b"half a plan"):
        (targeted.path / "engine.plan").write_bytes(content)
        truncated = open_engine(targeted.path, verify=False)
        truncated.manifest["compute_capabilities"] = []
        with pytest.raises(
            UserError, match=r"does not load .*engine\.plan \(the plan is damaged.*build the engine anew"
        ) as told:
            TrtSession(truncated)
        assert told.type is UserError
    monkeypatch.setattr(sys.modules["tensorrt_rtx"].Runtime, "get_engine_validity", lambda *_: (2, 1))
    with pytest.raises(CannotRunHere, match=r"does not load .*engine\.plan \(it was built by another TensorRT version"):
        TrtSession(truncated)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tensorrt_rtx"].Runtime, "deserialize_cuda_engine", lambda *_: None)
        patch.setattr(sys.modules["tensorrt_rtx"].Runtime, "get_engine_validity", lambda *_: (2, 2))
        with pytest.raises(CannotRunHere, match=r"\(it was not built for this GPU's compute capability\)"):
            TrtSession(truncated)
    monkeypatch.setattr(sys.modules["tensorrt_rtx"].Runtime, "get_engine_validity", lambda *_: (2, 1 | 32))
    with pytest.raises(UserError, match=r"another TensorRT version and the plan is damaged") as told:
        TrtSession(truncated)
    assert told.type is UserError


def test_a_plan_that_the_gpu_has_no_room_for_is_not_called_unfit(engine, machine, monkeypatch):
    """As TensorRT-RTX 1.6.1 said on an H100, where it calls every plan unfit for the compute capability."""
    _, trt = machine()
    said = "[defaultAllocator.cpp::allocateAsync::48] Error Code 1: Cuda Runtime (cudaError 2: out of memory)"

    def deserialize(self, plan):
        self.logger.log(1, said)

    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", deserialize)
    with pytest.raises(UserError, match=r"engine\.plan \([^;]*out of memory\)+: close other programs on the GPU"):
        TrtSession(engine)


def test_missing_cuda_bindings_name_the_command(engine, machine, monkeypatch):
    machine()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CannotRunHere, match="pip install 'cuda-bindings==12"):
        TrtSession(engine)


PROMPTS = [np.random.default_rng(7).integers(3, 97, length).tolist() for length in (3, 19, 8)]
MIXED = [
    SamplingParams(max_tokens=14, temperature=0.9, top_k=12, top_p=0.8, seed=3, repetition_penalty=1.3),
    SamplingParams(max_tokens=20, repetition_penalty=2.0, ignore_eos=True),
    SamplingParams(max_tokens=1),
]
# What is asked for together → one entry a prompt.
ASKED = {
    "greedy": [SamplingParams(max_tokens=12, ignore_eos=True)] * 3,
    "greedy, of different lengths": [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 30, 1)],
    "sampled": [SamplingParams(max_tokens=18, temperature=1.5, seed=n) for n in (0, 1, 2)],
    "top_k": [SamplingParams(max_tokens=12, temperature=2, top_k=k, seed=1) for k in (1, 2, 40)],
    "top_p": [SamplingParams(max_tokens=12, temperature=2, top_p=p, seed=1) for p in (0.1, 0.5, 0.95)],
    "min_p": [SamplingParams(max_tokens=12, temperature=2, min_p=p, seed=1) for p in (0.5, 0.05, 1.0)],
    "mixed": MIXED,
    "greedy beside sampled": [
        SamplingParams(max_tokens=12, temperature=n, seed=5, ignore_eos=True) for n in (1, 0, 1.5)
    ],
    "greedy again": [SamplingParams(max_tokens=12)] * 3,
    "stops": [SamplingParams(max_tokens=20, stop_token_ids=[*range(0, 97, n)], ignore_eos=True) for n in (3, 9, 96)],
}


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("smallest", [8, runtime._SMALLEST_CONTEXT])
def test_the_device_chooses_what_the_host_would(engine, machine, reference, monkeypatch, smallest, graphs):
    """One session for all, so that graphs of earlier requests are launched again for later ones."""
    monkeypatch.setattr(runtime, "_SMALLEST_CONTEXT", smallest)
    cuda, trt = machine()
    session = TrtSession(engine, cuda_graphs=graphs)
    assert isinstance(session, DeviceSession) and not isinstance(reference, DeviceSession)
    seen = {}
    for name, params in ASKED.items():
        for count in (3, 1):
            seen[name, count] = tokens(session, PROMPTS[:count], params[:count])
            assert seen[name, count] == tokens(reference, PROMPTS[:count], params[:count]), name
    assert {reason for said in seen.values() for _, reason in said} == {"stop", "length"}
    assert seen["sampled", 3][0][0] != seen["greedy", 3][0][0]
    assert seen["sampled", 3][0] == seen["sampled", 1][0]  # a seed's tokens are the same beside others
    assert seen["greedy", 3] == [(each[0][:12], each[1]) for each in seen["greedy", 3]]
    assert {run["kv_range"][0] for run in trt.runs_of(PLAN)} == ({8, 16, 24, 32, 40} if smallest == 8 else {48})
    assert (cuda.calls["cudaGraphLaunch"] > 100) == graphs
    session.close()
    assert not cuda.live and not cuda.streams


def streaming_tokens(session, prompt, params, copies=1):
    """The pieces behind the first of each prompt."""
    pieces = Scheduler(session).run(requests(session.spec, [prompt] * copies, [params] * copies), copies)
    for _ in range(copies):
        next(pieces)
    return pieces


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=30), MIXED[0]], ids=["greedy", "sampled"])
def test_a_token_costs_one_launch_and_the_copy_of_itself(engine, machine, params):
    cuda, trt = machine()
    session = TrtSession(engine)
    pieces = streaming_tokens(session, PROMPTS[0], dataclasses.replace(params, max_tokens=30))
    plan, other = (GREEDY, SAMPLER) if params.greedy else (SAMPLER, GREEDY)
    cuda.calls.clear()
    next(pieces)
    assert cuda.calls["cudaGraphInstantiate"] == 1 and cuda.calls["cudaGraphLaunch"] == 2
    for count in range(2, 12):
        cuda.calls.clear()
        next(pieces)
        assert cuda.calls == {
            "cudaGraphLaunch": 1, "cudaMemcpyAsync": 1, "cudaEventRecord": 1, "cudaEventSynchronize": 1
        }  # fmt: skip
        # None has run outside of the graph; of the step that was launched last nothing has been waited for.
        assert len(trt.runs_of(plan)) == len(trt.runs_of(PLAN)) == count
    cuda.calls.clear()
    pieces.close()
    assert not cuda.calls
    session.close()
    assert len(trt.runs_of(plan)) == 12 and not trt.runs_of(other)


def test_a_step_that_cannot_be_captured_at_first_runs_once_before(engine, machine, reference, monkeypatch):
    cuda, trt = machine()
    session, run, ready = TrtSession(engine), Context.run, set()

    def needs_a_first_run(context):
        if cuda.capturing and context not in ready:
            raise RuntimeError("TensorRT could not run a step: waits for a stream that is being captured")
        ready.update([context] if learns else [])
        run(context)

    learns = True
    monkeypatch.setattr(Context, "run", needs_a_first_run)
    asked = [SamplingParams(max_tokens=6, ignore_eos=True)]
    assert tokens(session, PROMPTS[:1], asked) == tokens(reference, PROMPTS[:1], asked)
    assert cuda.calls["cudaGraphLaunch"] == 4 and len(trt.runs_of(PLAN)) == 5
    session.close()
    assert not cuda.live and not cuda.graphs
    learns = False
    ready.clear()
    with pytest.raises(RuntimeError, match="waits for a stream that is being captured"):
        tokens(TrtSession(engine), PROMPTS[:1], asked)


def test_nothing_is_launched_past_the_last_token(engine, machine, reference):
    cuda, trt = machine()
    session = TrtSession(engine)
    asked = SamplingParams(max_tokens=6, ignore_eos=True)
    made = [piece.token_id for piece in streaming_tokens(session, PROMPTS[0], asked)]
    assert made == tokens(reference, PROMPTS[:1], [asked])[0][0][1:] and len(made) == 5
    assert cuda.calls["cudaGraphLaunch"] == len(trt.runs_of(PLAN)) == 5
    session.close()


def test_a_stream_that_is_left_in_the_middle_hurts_nobody(engine, machine, reference):
    machine()
    session = TrtSession(engine)
    for asked in (MIXED[:2], ASKED["greedy"][:2]):
        pieces = streaming_tokens(session, PROMPTS[0], MIXED[0], copies=2)
        next(pieces), next(pieces), pieces.close()
        assert tokens(session, PROMPTS[:2], asked) == tokens(reference, PROMPTS[:2], asked)
    session.close()


def test_memory_that_moves_captures_anew(engine, machine, reference, monkeypatch):
    monkeypatch.setattr(runtime, "logit_rows", lambda engine, slots: slots)
    cuda, _ = machine()
    session = TrtSession(engine)

    def captured(prompts, params) -> int:
        before = cuda.calls["cudaGraphInstantiate"]
        assert tokens(session, prompts, params) == tokens(reference, prompts, params)
        return cuda.calls["cudaGraphInstantiate"] - before

    greedy = ASKED["greedy"]
    assert [captured(PROMPTS[:1], greedy[:1]) for _ in range(3)] == [1, 0, 0]
    assert captured(PROMPTS, greedy) == 3  # more slots: the cache moved; 1, 2 and 3 of them decode while others come
    assert captured(PROMPTS, greedy) == 0
    wanted = np.arange(CHUNK)[None]
    session.step(np.zeros((1, CHUNK), np.int64), wanted, wanted)  # the logits move
    assert not cuda.executables
    assert captured(PROMPTS, greedy) == 3
    assert captured(PROMPTS, MIXED) > 0 and len(cuda.executables) > 3  # another sampler, beside the first
    assert captured(PROMPTS[:2], greedy[:2]) == captured(PROMPTS, greedy) == 0
    session.close()


def test_a_step_of_another_batch_size_between_does_not_break_a_graph(engine, machine, reference):
    cuda, _ = machine()
    session = TrtSession(engine)
    for turn in range(2):
        for each in (session, reference):
            assert tokens(each, PROMPTS[:2], ASKED["greedy"][:2])
        assert len(cuda.executables) == 2 + turn
        for first in (0, 1):
            one = np.zeros((1, 1), np.int64)
            session.step(one, one, one, first)
        assert len(cuda.executables) == 3  # one of the first slot's logits
    assert tokens(session, PROMPTS[:2], MIXED[:2]) == tokens(reference, PROMPTS[:2], MIXED[:2])
    session.close()


@pytest.mark.parametrize(
    "length, rows",
    [
        (1, 256),
        (256, 256),
        (257, 512),
        (2048, 2048),
        (2049, 2304),
        (4097, 4608),
        (8192, 8192),
        (8193, 9216),
        (9300, 9999),
    ],
)
def test_a_step_sees_an_eighth_too_much_at_most(engine, machine, length, rows):
    machine()
    session = TrtSession(engine)
    session._opened = SimpleNamespace(capacity=9999)
    assert session._bucket(length) == rows
    session.close()


def test_graphs_are_as_many_as_slots_buckets_and_samplers(engine, machine, monkeypatch):
    monkeypatch.setattr(runtime, "_SMALLEST_CONTEXT", 8)
    cuda, trt = machine()
    session = TrtSession(engine)
    for _ in range(3):
        for params in (
            SamplingParams(ignore_eos=True, max_tokens=None),
            SamplingParams(temperature=1, max_tokens=None),
        ):
            for copies in (2, 1):
                tokens(session, [PROMPTS[0]] * copies, [dataclasses.replace(params, ignore_eos=True)] * copies)
    # 8, 16, 24, 32 and 40 rows of one or two slots and either sampler; a first token comes from the prefill.
    assert cuda.most_executables == len(cuda.executables) == 5 * 2 * 2
    assert len(trt.contexts) == 4  # prefill, decode and the two samplers
    session.close()


QUEUE = [np.random.default_rng(seed).integers(0, 97, 1 + 5 * seed % 23).tolist() for seed in range(9)]


@pytest.mark.parametrize("smallest", [8, runtime._SMALLEST_CONTEXT])
def test_slots_are_refilled_while_others_decode(engine, machine, reference, monkeypatch, smallest):
    """Nine requests of every kind in three slots; idle ones, and those whose prompt is coming, disturb nobody."""
    monkeypatch.setattr(runtime, "_SMALLEST_CONTEXT", smallest)
    cuda, trt = machine()
    session = TrtSession(engine)
    params = [each for kind in ("mixed", "sampled", "greedy, of different lengths") for each in ASKED[kind]]
    params = [dataclasses.replace(each, max_tokens=min(each.max_tokens, 14)) for each in params]
    alone = [tokens(reference, [prompt], [each])[0] for prompt, each in zip(QUEUE, params, strict=True)]
    scheduler, order = Scheduler(session), []
    for _ in range(2):  # the second time with what the cache still holds
        made = requests(session.spec, QUEUE, params)
        order = [piece.index for piece in scheduler.run(made, 3) if piece.completion]
        assert [request.token_ids for request in made] == [said for said, _ in alone]
    assert sorted(order) == [*range(9)] != order
    assert {run["input_ids"][0] for run in trt.runs_of(PLAN)} == {1, 2, 3}
    session.close()
    assert not cuda.live


def test_rows_of_another_slot_are_copied(engine, machine, reference):
    """Slots two and three wait for what they share with the first, and take a copy."""
    cuda, trt = machine()
    session = TrtSession(engine)
    shared = np.random.default_rng(0).integers(0, 97, 21).tolist()
    prompts = [[*shared, 3], [*shared, 5, 6, 7], [*shared[:18], 9]]
    asked = ASKED["greedy"]
    expected = [tokens(reference, [prompt], [each])[0] for prompt, each in zip(prompts, asked)]
    assert tokens(session, prompts, asked) == expected
    assert cuda.calls["cudaMemcpy2DAsync"] == 2 * 6  # keys and values of three layers, for each of two
    rows = sum(int(np.prod(run["input_ids"])) for run in trt.runs_of(PLAN, 1))
    assert rows < 3 * 19
    session.close()


def test_rows_that_someone_left_behind_reach_nobody(engine, machine, reference):
    """Whoever gets a slot finds zeros behind the rows that are his: others' may be NaN, and NaN times 0 is NaN."""
    cuda, _ = machine()
    session = TrtSession(engine)
    scheduler, prompt = Scheduler(session), PROMPTS[1]
    for _ in range(3):
        made = requests(session.spec, [prompt, *PROMPTS], ASKED["greedy"][:1] + ASKED["greedy"])
        for piece in scheduler.run(made, 2):
            if piece.completion:  # its slot is free, and what is behind its rows is whatever a step past its end wrote
                cuda.cudaStreamSynchronize(session._cuda.stream)
                for slot in scheduler._slots:
                    if slot.request is None:
                        for region in session._kv.places(slot.index).values():
                            size = (
                                region.size // (3 - slot.index)
                                if session._kv.slots == 3
                                else region.size // (2 - slot.index)
                            )
                            rows = np.frombuffer(cuda.inside(region.address, size), np.float32)
                            rows.reshape(2, engine.capacity, -1)[:, slot.rows :] = np.nan
        expected = [tokens(reference, [request.prompt], [ASKED["greedy"][0]])[0][0] for request in made]
        assert [request.token_ids for request in made] == expected
    session.close()


def test_drafts_are_checked_in_one_step(engine, machine, reference, monkeypatch):
    """Whatever is drafted, by whoever: the tokens are those of one step each, before and after it."""
    cuda, trt = machine()
    session = TrtSession(engine)
    rng = np.random.default_rng(0)
    plain = {}

    class Guessing:
        def draft(self, token_ids, most):
            for prompt, answer in plain.values():
                if token_ids[: len(prompt)] == prompt:
                    rest = answer[len(token_ids) - len(prompt) :][:most]
                    return Draft([token if rng.random() < 0.8 else 1 for token in rest], 0)

    class Eager(Speculation):
        def measured(self, sequences, rows, seconds):
            super().measured(sequences, rows, 1.0)

    on_host, row_logits = set(), session.row_logits
    for name in ("greedy", "sampled", "mixed", "greedy beside sampled"):
        monkeypatch.setattr(session, "row_logits", lambda *step, name=name: on_host.add(name) or row_logits(*step))
        for count in (1, 3):
            expected = tokens(reference, PROMPTS[:count], ASKED[name][:count])
            plain = {index: (list(PROMPTS[index]), said) for index, (said, _) in enumerate(expected)}
            speculation = Eager(Guessing)
            made = requests(session.spec, PROMPTS[:count], ASKED[name][:count])
            list(Scheduler(session, speculation=speculation).run(made, count))
            assert [request.token_ids for request in made] == [said for said, _ in expected]
            assert speculation.accepted > 0
    assert {run["logits_index"][1] for run in trt.runs_of(PLAN, 1)} >= {1, 2}
    assert {run["logits"][0] for run in trt.runs_of(GREEDY)} >= {2, 3 * 2}
    # Where one of three sequences is sampled, two rows of each: the device draws of eight in all.
    assert {run["logits"][0] for run in trt.runs_of(SAMPLER)} >= {1, 2, 8, 3 * 2}
    assert max(run["logits"][0] for run in trt.runs_of(SAMPLER)) <= CHUNK
    assert on_host == {"mixed"}  # what has a penalty
    session.close()


@pytest.mark.parametrize("graphs", [True, False])
def test_the_likeliest_token_of_every_row(engine, machine, reference, monkeypatch, graphs):
    cuda, _ = machine()
    session = TrtSession(engine, cuda_graphs=graphs)
    rng = np.random.default_rng(4)
    for each in (session, reference):
        each.reserve(3, 40)
    before = 0
    for rows in (2, 5, CHUNK, 2):
        ids = rng.integers(0, 97, (3, rows))
        positions = before + np.broadcast_to(np.arange(rows), (3, rows))
        logits = reference.step(ids, positions, np.broadcast_to(np.arange(rows), (3, rows)))
        for _ in range(2):
            assert np.array_equal(session.likeliest(ids, positions), logits.argmax(2))
            assert np.array_equal(session.row_logits(ids, positions), logits)
        before += rows
    assert cuda.calls["cudaGraphLaunch"] == (4 * 2 * 3 if graphs else 0)
    assert cuda.calls["cudaGraphInstantiate"] == (3 * 2 if graphs else 0)
    poison(cuda, session)
    assert (session.likeliest(ids, positions) == -1).all()
    monkeypatch.setattr(session, "most_checked", 5)
    with pytest.raises(ValueError, match="3 × 2 rows are to be checked, more than 5"):
        session.likeliest(ids, positions)
    with pytest.raises(ValueError, match="from slot 0 on, up to position 48, is more than what was reserved"):
        session.likeliest(ids, positions + 48 - int(positions.max()))
    session.close()
    assert not cuda.live


@pytest.mark.parametrize("graphs", [True, False])
def test_the_token_that_is_drawn_of_every_row(engine, machine, reference, graphs):
    """With the noise of the steps that follow, of each sequence that has a sampler."""
    cuda, _ = machine()
    session = TrtSession(engine, cuda_graphs=graphs)
    asked = [SamplingParams(temperature=1.3, seed=8), SamplingParams(top_p=0.5), SamplingParams(temperature=2, top_k=9)]
    samplers = [Sampler(params, 97, np.array([5])) for params in asked]
    rng, before = np.random.default_rng(6), 0
    for each in (session, reference):
        each.reserve(3, 40)
    for rows, count in ((2, 3), (CHUNK, 1), (2, 3), (4, 2)):
        ids = rng.integers(0, 97, (count, rows))
        positions = before + np.broadcast_to(np.arange(rows), (count, rows))
        logits = reference.step(ids, positions, np.broadcast_to(np.arange(rows), (count, rows)))
        draws = [samplers[0], None, samplers[2]][:count]
        drawn = session.drawn(ids, positions, draws)
        for sampler, given, rows_of_it in zip(draws, drawn, logits):
            assert sampler is None or given.tolist() == [sampler.choose(row)[0] for row in rows_of_it]
        before += rows
    nobodys = session.drawn(ids, positions - rows, [None, None])
    assert np.array_equal(nobodys, session.likeliest(ids, positions - rows))
    with pytest.raises(ValueError, match="9 rows are to be drawn of, more than 8"):
        session.drawn(np.zeros((3, 3), np.int64), np.zeros((3, 3), np.int64), [None] * 3)
    shuns = Sampler(SamplingParams(temperature=1, repetition_penalty=1.2), 97, np.array([5]))
    for wrong in ([samplers[0]], [samplers[0], shuns]):
        with pytest.raises(ValueError, match="takes a sampler without a repetition penalty, or None"):
            session.drawn(ids, positions, wrong)
    poison(cuda, session)
    assert (session.drawn(ids, positions, samplers[:2]) == -1).all()
    session.close()
    assert not cuda.live


def test_a_slot_is_told_only_what_is_new(engine, machine, reference):
    """Where it goes on, and not again how its tokens are chosen; noise where more are wanted than there was for."""
    cuda, _ = machine()
    session, params, prompt = TrtSession(engine), SamplingParams(temperature=1.3, seed=8), np.array([5, 9, 40])
    one, told, texts = np.zeros((1, 1), np.int64), [], []
    for each in (session, reference):
        sampler = Sampler(params, 97, prompt)
        each.reserve(1, 40)
        logits = each.step(prompt[None], np.arange(3)[None], one + 2)
        text = [*prompt, sampler.choose(logits[0, 0])[0]]
        for count, left in ((3, 12), (2, 9), (4, 7), (3, 3), (2, 2), (4, 8)):
            place = len(text) - 1
            if each is session:
                if left == 2:
                    session.park(0, place)
                before = cuda.calls["cudaMemcpyAsync"]
                session.admit(0, Decoding(text[-1], place, left, params, sampler))
                told.append(cuda.calls["cudaMemcpyAsync"] - before)
            for step in range(count):
                if each is session:
                    session.decode(1, place + step + 1, greedy=False)
                    text.append(int(session.tokens()[0]))
                    sampler.take(text[-1])
                else:
                    text.append(sampler.choose(each.step(np.array([text[-1:]]), one + place + step, one)[0, 0])[0])
        texts.append(text)
    assert texts[0] == texts[1]
    assert told == [11, 3, 3, 3, 11, 11]
    session.close()


@pytest.mark.parametrize("graphs", [True, False])
def test_a_first_check_moves_nothing(engine, machine, monkeypatch, graphs):
    """Where a sampler takes most, too; and what was made ready once is not counted again."""
    needs = fake_gpu.FakeEngine.activations
    monkeypatch.setattr(
        fake_gpu.FakeEngine,
        "activations",
        lambda self, shapes: 1000 * shapes["logits"][0] if self.name != PLAN else needs(self, shapes) // 100,
    )
    cuda, _ = machine()
    session = TrtSession(engine, cuda_graphs=graphs)
    sampler = Sampler(SamplingParams(temperature=1, seed=1), 97, np.array([5]))
    session.reserve(1, 30)
    one, rows = np.zeros((1, 1), np.int64), np.arange(CHUNK)[None]
    layout, counts = session._layout, []
    for _ in range(3):
        session.step(one, one + 9, one)
        session.likeliest(rows, rows)
        session.drawn(rows, rows, [sampler])
        session.row_logits(rows, rows)
        session.row_logits(rows[:, :2], rows[:, :2])
        counts.append(session.prepared)
    assert session._layout == layout
    assert counts[0] > 1 and counts == counts[:1] * 3
    session.close()


def test_activations_that_a_sampler_needs_more_of_are_told_to_the_decoder(engine, machine, reference, monkeypatch):
    """Whatever the sizes are, none of the two runs in memory that is gone."""
    needs = fake_gpu.FakeEngine.activations
    monkeypatch.setattr(
        fake_gpu.FakeEngine,
        "activations",
        lambda self, shapes: 100_000 // shapes["logits"][0] if self.name != PLAN else needs(self, shapes),
    )
    for graphs in (True, False):
        machine()
        session = TrtSession(engine, cuda_graphs=graphs)
        session.reserve(3, 40)  # at 3 slots the sampler needs the least
        monkeypatch.setattr(session, "_take_activations", lambda *_: None)
        assert tokens(session, PROMPTS[:1], MIXED[:1]) == tokens(reference, PROMPTS[:1], MIXED[:1])
        session.close()


def test_outputs_that_overlap_inputs_are_refused(engine, machine):
    machine()
    session = TrtSession(engine)
    session.reserve(2, 40)
    step_all(session, 1, 1)
    decoder = session._decoder(1, engine.capacity)
    places = session._kv.places() | session._state.places()
    places |= {"kv_range": session._range, "logits": session._logits}
    decoder.bind(places, session._activations)
    address, size = session._logits
    for name, place in (
        ("positions", Region(address, 8)),
        ("input_ids", Region(address + size - 256, 8)),
        ("past_key_1", Region(address - 1000, places["past_key_1"].size)),
    ):
        with pytest.raises(RuntimeError, match=f"the output logits would overwrite the input {name}"):
            decoder.bind(places | {name: place}, session._activations)
    sampler = session._sampler(True, 1, session._state.places(), engine.capacity)
    own = session._state.places() | {"logits": session._logits}
    with pytest.raises(RuntimeError, match="the output next_seen would overwrite the input seen"):
        sampler.bind(own | {"next_seen": own["seen"]}, session._activations)
    with pytest.raises(RuntimeError, match=r"logits \(1, 1, 97\) does not fit its 387 bytes"):
        decoder.bind(places | {"logits": Region(address, 387)}, session._activations)
    session.close()


def test_memory_is_told_by_kind(engine, machine):
    weights = engine.manifest["memory"]["weights"]
    cuda, trt = machine(weights=weights, free=1 << 30)
    session = TrtSession(engine)
    first = session.memory()
    kv = engine.capacity * engine.spec.kv_bytes_per_token()
    assert first.predicted.weights == weights == first.measured.weights
    assert first.predicted.kv_cache == kv == 48 * 3 * 2 * 2 * 16 * 4
    assert first.predicted.activations == max(engine.manifest["memory"]["activations"]) // 3
    assert first.measured.kv_cache == first.measured.activations == 0
    session.reserve(3, 40)
    tokens(session, PROMPTS, MIXED)
    last = session.memory()
    assert last.predicted.kv_cache == last.measured.kv_cache == 3 * kv
    assert last.measured.activations == aligned(3 * CHUNK * CHUNK * 1000)  # a check of a chunk of rows of each
    assert last.measured.total == cuda.used()
    # Logits, noise, marks, inputs and the range, and what a check draws with, each rounded up: as predicted but for that.
    assert 0 < last.measured.scratch - last.predicted.scratch < 256 * 48
    said = last.to_json()["measured"]
    assert said["total"] == said["weights"] + said["kv_cache"] + said["activations"] + said["scratch"]
    session.close()


def test_an_engine_that_does_not_fit_is_refused_before_the_gpu_is_touched(engine, machine):
    needed = predict(engine, 1, WeightBudget(), None).total + RESERVE
    cuda, _ = machine(free=needed - 1)
    with pytest.raises(UserError) as caught:
        TrtSession(engine)
    said = str(caught.value)
    memory = engine.manifest["memory"]
    assert f"needs {memory['weights'] / 1e9:.2f} GB for weights, 0.00 GB for the KV cache" in said
    assert f"{(needed - 1) / 1e9:.2f} GB of GPU memory are free: build it with fewer bits, --weight-streaming" in said
    assert not cuda.calls
    machine(free=needed)
    TrtSession(engine).close()


def test_more_sequences_than_fit_are_refused_with_the_numbers(engine, machine):
    kv = engine.capacity * engine.spec.kv_bytes_per_token()
    cuda, _ = machine()
    session = TrtSession(engine)
    session.reserve(1, 40)
    cuda.total = cuda.used() + kv  # and what one slot's cache gives back, but three are wanted
    with pytest.raises(
        UserError, match="generating 3 sequences together needs 0.00 GB for weights, .*GB together, but"
    ):
        session.reserve(3, 40)
    with pytest.raises(ValueError, match="more than what was reserved"):
        step_all(session, 1, 1)
    session.reserve(1, 40)
    assert np.isfinite(step_all(session, 1, 1)).all()
    session.close()
    assert not cuda.live


@pytest.mark.parametrize("allocation", ["profile", "static"])
def test_tensorrt_may_allocate_by_itself(engine, machine, reference, allocation):
    cuda, trt = machine()
    session = TrtSession(engine, allocation=allocation)
    for params in (MIXED, ASKED["greedy"]):
        assert tokens(session, PROMPTS, params) == tokens(reference, PROMPTS, params)
    assert {context.strategy for context in trt.contexts} == {allocation}
    whole = 3 * CHUNK * CHUNK * 1000
    taken = {context.memory[1] for context in trt.contexts}
    assert taken == {whole, CHUNK * 500, 3 * CHUNK * 500} | ({3000} if allocation == "profile" else set())
    measured = session.memory().measured
    assert measured.activations == 0 and measured.scratch > sum(context.memory[1] for context in trt.contexts)
    session.close()
    assert not cuda.live
    with pytest.raises(UserError, match="allocation should be user, profile, static, but is 'pool'"):
        TrtSession(engine, allocation="pool")


@pytest.mark.parametrize(
    "said, found",
    [
        ("auto", WeightBudget()),
        ("50%", WeightBudget(percent=50)),
        (" 12.5 % ".replace(" %", "%"), WeightBudget(percent=12.5)),
        (1000, WeightBudget(1000)),
        ("0", WeightBudget(0)),
        ("4G", WeightBudget(4 * 10**9)),
        ("1.5GiB", WeightBudget(3 << 29)),
        ("64MB", WeightBudget(64 * 10**6)),
        ("2ki", WeightBudget(2048)),
        (WeightBudget(7), WeightBudget(7)),
    ],
)
def test_weight_budgets(said, found):
    assert WeightBudget.parse(said) == found


@pytest.mark.parametrize("said", ["", "much", "-1", "101%", "nan%", "nan", "1e99", "4T", "G", "4 GG", "inf", None])
def test_what_is_no_weight_budget(said):
    with pytest.raises(UserError, match="a weight budget should be auto, a share as 50%, or a size as 4G"):
        WeightBudget.parse(said)


def test_a_budget_is_resolved_for_the_weights_and_the_room():
    assert WeightBudget().resolve(1000, 1000, 200) == 1000
    assert WeightBudget().resolve(1000, 999, 200) == 799  # streaming takes memory of its own
    assert WeightBudget().resolve(1000, 100, 200) == 0
    assert WeightBudget(2000).resolve(1000, 0, 200) == 1000 and WeightBudget(10).resolve(1000, 5000, 200) == 10
    assert WeightBudget(percent=12.5).resolve(1000, 0, 0) == 125


@pytest.fixture
def streaming(engine):
    """The engine as if it had been built with --weight-streaming, of weights of 500 MB, the largest of 1 MB."""
    memory = engine.manifest["memory"] | {"weights": 500 << 20, "largest_weight": 1 << 20}
    return dataclasses.replace(engine, manifest=engine.manifest | {"flags": ["WEIGHT_STREAMING"], "memory": memory})


def beside(engine):
    """What one sequence takes beside weights, from the parts."""
    state = 2 * 97 + 4 * engine.capacity + 48 * CHUNK + CHUNK * (2 + 4) * 97 + 8 * engine.capacity
    activations = max(engine.manifest["memory"]["activations"])  # those of the largest shapes: it streams
    return engine.capacity * engine.spec.kv_bytes_per_token() + activations + state


@pytest.mark.parametrize(
    "asked, kept",
    [("auto", None), ("10%", 50 << 20), (123_456, 123_456), ("900M", 500 << 20)],
)
@pytest.mark.parametrize("total", [1 << 30, 700 << 20])
def test_weights_are_streamed_within_a_budget(streaming, machine, reference, asked, kept, total):
    """The budget is set before contexts exist (the fake asserts it), and is what was predicted."""
    room = total - beside(streaming) - RESERVE
    assert room_for_weights(streaming, 1, total) == room
    if kept is None:
        kept = 500 << 20 if total == 1 << 30 else room - (2 << 20)
    if kept == 500 << 20 and total < 1 << 30:
        machine(total, engine=streaming, weights=500 << 20, free=total)
        with pytest.raises(UserError, match="needs 0.52 GB for weights.*: lower --weight-budget, or build it"):
            TrtSession(streaming, weight_budget=asked)
        return
    cuda, trt = machine(total, engine=streaming, weights=500 << 20, free=total)
    session = TrtSession(streaming, weight_budget=asked)
    assert trt.budgets == [kept] and trt.read_as_stream == [PLAN]
    use = session.memory()
    assert use.predicted.weights == use.measured.weights == kept
    assert use.predicted.total == kept + beside(streaming) + (0 if kept == 500 << 20 else 2 << 20)
    assert use.predicted.total + RESERVE <= total
    assert tokens(session, PROMPTS[:1], MIXED[:1]) == tokens(reference, PROMPTS[:1], MIXED[:1])
    measured = session.memory().measured  # what streaming takes is no activation, though contexts ask for both as one
    streams = kept < 500 << 20
    rows = (3 if streams else 1) * CHUNK * CHUNK  # a session that streams takes what the largest shapes need
    assert measured.activations == aligned(1000 * rows + streams * (2 << 20)) - streams * (2 << 20)
    assert measured.total == cuda.used() and (measured.scratch > 2 << 20) == streams
    session.close()
    assert not cuda.live


def test_the_activations_of_a_session_that_streams_never_move(streaming, machine, reference):
    machine(engine=streaming, weights=500 << 20)
    session = TrtSession(streaming, weight_budget="50%")
    places = set()
    for prompts, params in ((PROMPTS[:1], MIXED[:1]), (PROMPTS, MIXED), (PROMPTS[:1], ASKED["greedy"][:1])):
        assert tokens(session, prompts, params) == tokens(reference, prompts, params)
        places.add(session._activations)
    session.step(np.zeros((1, CHUNK), np.int64), np.arange(CHUNK)[None], np.arange(CHUNK)[None])
    assert places == {session._activations}
    session.close()


def test_a_session_that_streams_refuses_an_allocation_by_profile(streaming, machine):
    machine(engine=streaming, weights=500 << 20)
    with pytest.raises(UserError, match="computes wrong values.*use --allocation user or static"):
        TrtSession(streaming, allocation="profile")


def test_an_engine_that_does_not_stream_refuses_a_budget(engine, machine):
    cuda, trt = machine(weights=1 << 20)
    with pytest.raises(UserError, match="does not stream its weights, so it takes no --weight-budget"):
        TrtSession(engine, weight_budget="10%")
    session = TrtSession(engine)
    assert not trt.budgets and not trt.read_as_stream and session.memory().measured.weights == 1 << 20
    session.close()


def test_a_budget_that_tensorrt_does_not_take_is_told(streaming, machine, monkeypatch):
    machine(engine=streaming, weights=500 << 20)
    refusing = property(lambda self: 0, lambda self, budget: None)
    monkeypatch.setattr(fake_gpu.FakeEngine, "weight_streaming_budget_v2", refusing)
    with pytest.raises(UserError, match="refuses a weight budget of 52428800 bytes"):
        TrtSession(streaming, weight_budget="10%")


@pytest.mark.parametrize("allocations", range(1, 12))
def test_a_reserve_that_fails_midway_can_be_tried_again(engine, machine, reference, monkeypatch, allocations):
    """Every place where the memory of slots may run out: activations, cache, both decode states and their tokens, inputs
    on either side, logits on either side."""
    cuda, _ = machine()
    session = TrtSession(engine)
    session.reserve(1, 20)
    session._free_slots()
    held = {*cuda.live}
    session.reserve(1, 20)
    real, left = cuda._allocate, allocations

    def failing(size, on_device):
        nonlocal left
        left -= 1
        return (1, None) if left == 0 else real(size, on_device)

    monkeypatch.setattr(cuda, "_allocate", failing)
    with pytest.raises(UserError, match="no room"):
        session.reserve(3, 20)
    monkeypatch.setattr(cuda, "_allocate", real)
    grown = {session._activations.address, session._logits.address}
    grown |= set() if session._host_logits is None else {session._host_logits.ctypes.data}
    assert {*cuda.live} - held <= grown
    with pytest.raises(ValueError, match="more than what was reserved"):
        session.step(np.array([[5]]), np.array([[0]]), np.array([[0]]))
    assert tokens(session, PROMPTS, MIXED) == tokens(reference, PROMPTS, MIXED)
    session.close()
    assert not cuda.live


def test_compiled_kernels_are_kept_for_the_next_start(engine, machine, tmp_path, monkeypatch):
    def compiled(**options):
        cuda, trt = machine()
        monkeypatch.setenv(kernel_cache.FOLDER, str(tmp_path / "kernels"))
        session = TrtSession(engine, **options)
        tokens(session, PROMPTS[:1], MIXED[:1])
        session.close()
        assert not cuda.live
        return sorted(set(trt.compiled))

    every = sorted([PLAN, GREEDY, SAMPLER])
    assert compiled() == every
    kept = sorted((tmp_path / "kernels").iterdir())
    assert len(kept) == 3 and {path.suffix for path in kept} == {".kernels"}
    contents = [path.read_bytes() for path in kept]
    assert {content.split(b":")[1].decode() for content in contents} == set(every)
    assert compiled() == []
    kept[1].write_bytes(b"half a")
    assert compiled() == [contents[1].split(b":")[1].decode()]
    assert [path.read_bytes() for path in kept] == contents
    assert compiled() == []
    assert compiled(kernel_cache=None) == every
    assert compiled(kernel_cache=tmp_path / "elsewhere") == every and len([*(tmp_path / "elsewhere").iterdir()]) == 3
    (tmp_path / "file").write_text("")
    assert compiled(kernel_cache=tmp_path / "file" / "below") == every  # it cannot be written, and that is all
    assert sorted((tmp_path / "kernels").iterdir()) == kept


def test_where_compiled_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(kernel_cache.FOLDER, raising=False)
    assert kernel_cache.default_folder() == tmp_path / "llmtrt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kernel_cache.default_folder() == type(tmp_path).home() / ".cache" / "llmtrt"
    monkeypatch.setenv(kernel_cache.FOLDER, str(tmp_path / "mine"))
    assert kernel_cache.default_folder() == tmp_path / "mine"
    monkeypatch.setenv(kernel_cache.FOLDER, "")
    assert kernel_cache.default_folder() is None


def test_an_empty_variable_turns_the_kernel_cache_off(engine, machine, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cuda, trt = machine()
    session = TrtSession(engine)
    session.reserve(1, 40)
    session.close()
    assert trt.compiled and os.listdir(tmp_path) == []


def test_another_driver_has_kernels_of_its_own(engine, machine, tmp_path):
    for driver in ("580.0", "590.0"):
        gpu = dataclasses.replace(fake_gpu.GPU.gpus[0], driver=driver)
        machine(gpus=dataclasses.replace(fake_gpu.GPU, gpus=(gpu,)))
        session = TrtSession(engine, kernel_cache=tmp_path)
        session.reserve(1, 40)
        session.close()
    assert len(os.listdir(tmp_path)) == 6


@pytest.mark.parametrize("asked", [ASKED["greedy"], MIXED], ids=["greedy", "sampled"])
def test_logits_that_are_not_numbers_end_the_request(engine, machine, asked):
    cuda, _ = machine()
    session = TrtSession(engine)
    made = requests(session.spec, PROMPTS[:2], asked[:2])
    pieces = Scheduler(session).run(made, len(made))
    next(pieces), next(pieces)  # the first token of both
    poison(cuda, session)
    with pytest.raises(UserError, match=r"logits are not numbers \(NaN or infinite\)"):
        list(pieces)
    assert tokens(session, PROMPTS[:2], asked[:2])  # and the next one is fine
    session.close()


def test_log_probabilities_are_chosen_on_the_host(engine, machine, reference):
    cuda, trt = machine()
    session = TrtSession(engine)
    params = [dataclasses.replace(each, logprobs=2) for each in MIXED]
    assert tokens(session, PROMPTS, params) == tokens(reference, PROMPTS, params)
    assert trt.runs_of(PLAN) and not trt.runs_of(GREEDY) and not trt.runs_of(SAMPLER)
    both = [MIXED[0], params[1]]
    assert tokens(session, PROMPTS[:2], both) == tokens(reference, PROMPTS[:2], both)
    made = requests(session.spec, PROMPTS[:1], params[:1])
    completion = [piece.completion for piece in Scheduler(session).run(made, 1)][-1]
    assert len(completion.logprobs) == len(completion.token_ids) and len(completion.logprobs[0].top) == 2
    session.close()


@pytest.mark.parametrize("failing", ["_load", "make_runtime", "deserialize", "KvCache", "DecodeLoop"])
def test_a_failure_anywhere_in_loading_frees_everything(engine, machine, monkeypatch, failing):
    cuda, trt = machine(weights=1 << 20)
    where, calls = (TrtSession if failing == "_load" else runtime), []
    before = getattr(where, failing)

    def fail(*arguments):
        calls.append(arguments)
        if failing != "deserialize" or len(calls) == 3:
            raise ZeroDivisionError
        return before(*arguments)

    monkeypatch.setattr(where, failing, fail)
    with pytest.raises(ZeroDivisionError):
        TrtSession(engine)
    calls.clear()
    assert not cuda.live and not cuda.streams and not cuda.events and not trt.contexts
    assert cuda.ended.count("engine") == {"deserialize": 2, "KvCache": 3, "DecodeLoop": 3}.get(failing, 0)


def test_host_code_has_to_be_trusted(engine, machine, monkeypatch):
    cuda, trt = machine()
    compatible = dataclasses.replace(engine, manifest=engine.manifest | {"flags": ["VERSION_COMPATIBLE"]})
    with pytest.raises(UserError, match="carries code that runs on this machine: pass --trust-host-code"):
        TrtSession(compatible)
    assert not cuda.live and not cuda.streams and not cuda.ended.count("runtime")
    session = TrtSession(compatible, trust_host_code=True)
    assert session._runtime.engine_host_code_allowed is True
    session.close()
    plain = TrtSession(engine, trust_host_code=True)  # for whom there is nothing to trust
    assert not hasattr(plain._runtime, "engine_host_code_allowed")
    plain.close()


@pytest.fixture(scope="module")
def shown(engine, tmp_path_factory):
    """An engine whose MLPs' and norm's values are outputs, and the graph for the fake."""
    folder = tmp_path_factory.mktemp("shown")
    patterns = ("*mlp.down_proj/Reshape_2", "model.norm/*")
    built = built_small(engine.package_path, folder / "engine", debug_tensors=patterns)
    model, _ = lower(load_graph(open_package(engine.package_path)), None, [])
    assert expose(model, patterns) == built.debug_tensors and len(built.debug_tensors) == 4
    graph = folder / "shown.onnx"
    ir.save(model, graph)
    shutil.copyfile(engine.package_path / "model.onnx.data", folder / "model.onnx.data")
    return built, graph


def test_a_decode_step_says_that_its_row_takes_the_other_form_of_attention(machine, tmp_path):
    """And has the profile of its batch size, where there is one: of 3, 2 and 1 sequences, 2 alone has none."""
    quantize(families.save("mistral", tmp_path / "checkpoint"), tmp_path / "package", "fp16")
    engine = built_small(tmp_path / "package", tmp_path / "engine")
    names = [profile["name"] for profile in engine.profiles]
    assert names == ["decode", "prefill", "decode, batch 3"] and "split_attention" in engine.manifest["lowerings"]
    cuda, trt = machine(engine=engine)
    session = TrtSession(engine)
    expected = OrtSession(open_package(engine.package_path), threads=1, accuracy_level=1, chunk=CHUNK)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (12, 8, 4)]
    assert tokens(session, PROMPTS, params) == tokens(expected, PROMPTS, params)
    decodes, prefills = trt.runs_of(PLAN), trt.runs_of(PLAN, 1)
    assert {run["decode_rows"] for run in decodes} == {(1,)} and {run["decode_rows"] for run in prefills} == {(0,)}
    used = {(profile, run["input_ids"][0]) for name, profile, run in trt.runs if name == PLAN and profile != 1}
    assert used == {(2, 3), (0, 2), (0, 1)}
    session.close()
    assert not cuda.live


def test_prompts_are_padded_to_sizes_that_have_kernels_of_their_own(machine, monkeypatch, tmp_path):
    """From three quarters of 8 rows on, unless that would be past the cache; what padding leaves there is never read."""
    monkeypatch.setattr("llmtrt.engine.options._FEWEST_STEADY", CHUNK)
    quantize(families.save("mistral", tmp_path / "checkpoint"), tmp_path / "package", "fp32")
    engine = built_small(tmp_path / "package", tmp_path / "engine")
    names = [profile["name"] for profile in engine.profiles]
    free, steady = names.index("prefill"), names.index("prefill, 8 rows")
    cuda, trt = machine(engine=engine)
    session = TrtSession(engine)
    expected = OrtSession(open_package(engine.package_path), threads=1, accuracy_level=1, chunk=CHUNK)
    rng, params = np.random.default_rng(1), SamplingParams(max_tokens=4, ignore_eos=True)
    padded = steady, 8
    for length, parts in (
        (5, [(free, 5)]),
        (6, [padded]),
        (8, [padded]),
        (12, [padded, (free, 4)]),
        (15, [padded, padded]),
    ):
        prompts, before = [rng.integers(0, 97, length).tolist()], len(trt.runs)
        assert tokens(session, prompts, [params]) == tokens(expected, prompts, [params])
        used = [(profile, run["input_ids"][1]) for name, profile, run in trt.runs[before:] if name == PLAN]
        assert [step for step in used if names[step[0]].startswith("prefill")] == parts
    two = [rng.integers(0, 97, 8).tolist() for _ in range(2)]
    assert tokens(session, two, [params] * 2) == tokens(expected, two, [params] * 2)
    # A step whose rows all have logits, and one that has no room for padding, run as they are.
    session.reserve(1, 12)
    session.step(np.zeros((1, 7), np.int64), np.arange(7)[None], np.arange(7)[None])
    assert trt.runs[-1][1] == free and trt.runs[-1][2]["input_ids"] == (1, 7)
    session.step(np.zeros((1, 7), np.int64), 13 + np.arange(7)[None], np.array([[6]]))
    assert trt.runs[-1][1] == free
    session.step(np.zeros((1, 7), np.int64), 12 + np.arange(7)[None], np.array([[6]]))
    assert trt.runs[-1][1] == steady
    session.close()
    assert not cuda.live


@pytest.mark.parametrize("graphs", [True, False])
def test_debug_tensors_have_the_values_of_the_last_step(shown, machine, monkeypatch, graphs):
    monkeypatch.setattr(runtime, "_SMALLEST_CONTEXT", 8)
    built, graph = shown
    cuda, trt = machine(engine=built, graph=graph)
    session = TrtSession(built, cuda_graphs=graphs)
    assert session.debug_values() == {}
    session.reserve(2, 40)
    logits = np.asarray(step_all(session, 4, 4))
    values = session.debug_values()
    assert list(values) == built.debug_tensors and {array.dtype for array in values.values()} == {np.dtype(np.float32)}
    assert [array.shape for array in values.values()] == [(1, 4, 48)] * 4
    head = next(v for k, v in load_graph(open_package(built.package_path)).graph.initializers.items() if "lm_head" in k)
    weight = head.const_value.numpy()
    again = values[built.debug_tensors[-1]] @ (weight.T if weight.shape[0] == 97 else weight)
    assert np.abs(again - logits).max() < 1e-4 * np.ptp(logits)
    # Buckets are crossed, and the first comes again: no graph may write where the values of another lie.
    for _ in range(2):
        assert len(tokens(session, [PROMPTS[0]] * 2, [SamplingParams(max_tokens=30, ignore_eos=True)] * 2)[0][0]) == 30
        assert session.debug_values()[built.debug_tensors[0]].shape == (2, 1, 48)
    session.close()
    assert not cuda.live


def test_bits_of_bfloat16_are_read_as_numbers():
    bits = np.array([0x3F80, 0xC040, 0x7F80, 0x0000], np.uint16)
    assert runtime._numbers(bits).tolist() == [1.0, -3.0, np.inf, 0.0]
    half = np.ones(2, np.float16)
    assert runtime._numbers(half) is half


def test_a_step_that_was_not_bound_whole_leaves_nothing_behind(engine, machine, monkeypatch):
    """The next step of the same shapes, for another slot, is bound anew."""
    machine()
    session = TrtSession(engine)
    session.reserve(3, 20)

    def step(first: int) -> None:
        session.step(np.array([[3, 4]]), np.array([[0, 1]]), np.array([[1]]), first)

    step(0)
    log = session._logger.log
    with monkeypatch.context() as patch:
        patch.setattr(fake_gpu.FakeContext, "set_device_memory", lambda *_: log(1, "out of cheese"))
        with pytest.raises(RuntimeError, match="out of cheese"):
            step(1)
    session.reserve(3, 20)
    step(0)
    bound = session._contexts[PLAN, 1]._context.addresses["past_key_0"]
    assert bound == session._kv.places(0)["past_key_0"].address != session._kv.places(1)["past_key_0"].address
    session.close()
