"""TrtSession on a fake GPU (see fake_gpu) against OrtSession: the same numbers through other memory."""

import dataclasses
import shutil
import sys

import fake_gpu
import families
import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx_bindings")

from llmtrt.engine import flavor as flavors
from llmtrt.engine.build import build
from llmtrt.engine.gpu import Gpus
from llmtrt.engine.manifest import open_engine
from llmtrt.errors import UserError
from llmtrt.package import open_package
from llmtrt.quantization.pipeline import quantize
from llmtrt.runtime import tensorrt as runtime
from llmtrt.runtime.onnxruntime import OrtSession
from llmtrt.runtime.tensorrt import TrtSession

CHUNK = 8


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    quantize(families.save("mistral", folder / "checkpoint"), folder / "package", "fp32")
    return build(folder / "package", folder / "engine", max_batch=3, max_seq=40, chunk=CHUNK).engine


@pytest.fixture
def machine(engine, monkeypatch):
    """Replaces GPU, CUDA and TensorRT; ``machine(...)`` again changes what they are."""

    def replace(total: int = 1 << 30, version: str | None = None, gpus: Gpus = fake_gpu.GPU):
        cuda = fake_gpu.FakeCuda(total)
        trt = fake_gpu.FakeTensorRT(engine, cuda, version)
        monkeypatch.setattr(runtime, "find_gpus", lambda: gpus)
        monkeypatch.setattr(flavors, "_find", lambda name: flavors.describe(name, trt))
        bindings = type(sys)("cuda.bindings")
        bindings.runtime = cuda
        for name, module in (("cuda", type(sys)("cuda")), ("cuda.bindings", bindings), ("cuda.bindings.runtime", cuda)):
            monkeypatch.setitem(sys.modules, name, module)
        return cuda, trt

    return replace


@pytest.fixture
def reference(engine):
    session = OrtSession(open_package(engine.package_path, verify=False), threads=1, accuracy_level=1, chunk=CHUNK)
    yield session
    session.close()


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
    decode, prefill = trt.runs
    assert {run["input_ids"][1] for run in decode} == {1}
    assert {run["input_ids"][1] for run in prefill} >= {CHUNK}
    ranges = {run["kv_range"][0] for run in decode + prefill}
    assert ranges == ({8, 16, 32, engine.capacity} if smallest == 8 else {engine.capacity})
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
def test_buffers_that_grow_are_told_to_both_contexts(engine, machine, reference, shapes):
    machine()
    session = TrtSession(engine)
    for each in (session, reference):
        each.reserve(1, 40)
    grown, start = [], 0
    for rows, wanted in shapes:
        logits, expected = (step_all(each, rows, wanted, start) for each in (session, reference))
        assert np.abs(logits - expected).max() <= 1e-4 * np.ptp(expected)
        grown.append((session._activation_bytes, session._host_logits.size))
        start += rows
    assert grown[-1] != grown[0]
    session.close()


def poison(cuda, session):
    """NaN in all of the cache, as a request leaves whose activations overflow."""
    size = sum(runtime._aligned(session._slots * each) for *_, each in session._caches)
    np.frombuffer(cuda.inside(session._kv, size), np.float32)[:] = np.nan


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


@pytest.mark.parametrize(
    "room, message",
    [
        (lambda plan, cache: plan + cache - 1, "for the KV cache of one sequence, but .* GB are free"),
        (lambda plan, cache: plan + cache, "3 sequences need .* GB of GPU memory for the KV cache"),
    ],
)
def test_memory_is_predicted_before_it_is_taken(engine, machine, room, message):
    cache = engine.capacity * engine.spec.kv_bytes_per_token()
    # The fake holds no weights, so what the plan takes stays free until the cache is asked for.
    total = room(engine.plan.stat().st_size, cache)
    cuda, _ = machine(total)
    with pytest.raises(UserError, match=message):
        session = TrtSession(engine)
        cuda.total = 3 * cache - 1
        session.reserve(3, 40)


def test_a_failed_load_leaves_no_memory_behind(engine, machine, monkeypatch):
    cuda, _ = machine()
    monkeypatch.setattr(TrtSession, "_find_caches", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TrtSession(engine)
    assert not cuda.live and not cuda.streams


def test_tensorrt_goes_before_what_it_uses(engine, machine):
    """Contexts, engine, runtime; then the memory and the stream that they were given."""
    cuda, trt = machine()
    session = TrtSession(engine)
    session.reserve(2, 20)
    step_two = np.zeros((2, 1), np.int64)
    session.step(step_two, step_two, step_two)
    cuda.ended.clear()
    session.close()
    assert cuda.ended[:4] == ["context", "context", "engine", "runtime"]
    assert {*cuda.ended[4:-1]} == {"memory"} and cuda.ended[-1] == "stream"


def test_a_cache_that_is_not_updated_in_place_is_refused(engine, machine, monkeypatch):
    cuda, _ = machine()
    monkeypatch.setattr(fake_gpu.FakeEngine, "get_aliased_input_tensor", lambda self, name: None)
    with pytest.raises(UserError, match="present_key_0 is not updated in place: build the engine anew"):
        TrtSession(engine)
    assert not cuda.live and not cuda.streams


@pytest.mark.parametrize(
    "asked, total, budget",
    [(None, 1 << 30, 1 << 20), (None, 900_000, None), (1000, 1 << 30, 1000), (1 << 40, 0, 1 << 20)],
)
def test_weights_are_streamed_within_a_budget(engine, machine, asked, total, budget):
    cuda, trt = machine(total or 1 << 30)
    trt.streamable = 1 << 20
    streaming = dataclasses.replace(engine, manifest={**engine.manifest, "flags": ["WEIGHT_STREAMING"]})
    session = TrtSession(streaming, weight_budget=asked)
    if budget is None:  # what is left beside the cache of one sequence, less an eighth
        budget = total - total // 8 - engine.capacity * engine.spec.kv_bytes_per_token()
        assert 0 < budget < trt.streamable
    assert trt.budgets == [budget]
    session.close()


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
            return False  # as TensorRT says where it folded constants away

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


def test_a_plan_that_cannot_be_filled_says_why(stripped, machine):
    cuda, trt = machine()
    with pytest.raises(UserError, match="holds no weights, and the package .* put it back there"):
        TrtSession(dataclasses.replace(stripped, package_path=None))
    refitting(trt, left_out=["a.weight", "b.weight", "c.weight", "d.weight", "e.weight"])
    with pytest.raises(
        UserError, match="could not be filled from .*: a.weight, b.weight, c.weight and 2 more is missing"
    ):
        TrtSession(stripped)
    refitting(trt, works=False)
    with pytest.raises(UserError, match="could not be filled from .*no reason given"):
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
        with pytest.raises(UserError, match=rf"TensorRT rtx .* does not start \(.*{match}\): `llmtrt doctor`"):
            TrtSession(engine)
        assert not cuda.live and not cuda.streams


def test_what_tensorrt_refuses_is_an_error_with_its_reason(engine, machine, monkeypatch):
    """The latest one, not what it complained of before."""
    machine()
    session = TrtSession(engine)
    session.reserve(1, 20)
    log = session._logger.log
    for name in ("set_tensor_address", "set_input_shape", "execute_async_v3"):
        log(1, "an old complaint")
        if name == "execute_async_v3":
            step_all(session, 1, 1)  # from here on the contexts are prepared
            log(1, "an old complaint")
        else:
            session._prepared = [None, None]
        with monkeypatch.context() as patch:
            patch.setattr(fake_gpu.FakeContext, name, lambda *_: log(1, "out of cheese"))
            with pytest.raises(RuntimeError, match="^TensorRT .*out of cheese$"):
                step_all(session, 1, 1)
    assert np.isfinite(step_all(session, 1, 1)).all()
    session.close()


def test_an_engine_that_does_not_fit_says_what_does_not(engine, machine, tmp_path):
    output = tmp_path / "targeted"
    targeted = build(engine.package_path, output, max_seq=16, chunk=8, compute_capabilities=("12.0",)).engine
    machine(version="1.7.1.116")
    with pytest.raises(
        UserError, match=rf"built with TensorRT rtx {engine.flavor_version} and 1\.7\.1\.116 is installed"
    ):
        TrtSession(engine)
    machine(gpus=Gpus((), problem="the NVIDIA driver sees no GPU"))
    with pytest.raises(UserError, match="needs an NVIDIA GPU, but the NVIDIA driver sees no GPU"):
        TrtSession(engine)
    machine()
    with pytest.raises(UserError, match="kernel_specialization should be LAZY, EAGER, NONE, but is 'FAST'"):
        TrtSession(engine, kernel_specialization="FAST")
    with pytest.raises(UserError, match="built for compute capability 12.0, but Fake GPU has 8.9"):
        TrtSession(targeted)
    for content in (b"", b"half a plan"):
        (targeted.path / "engine.plan").write_bytes(content)
        truncated = open_engine(targeted.path, verify=False)
        truncated.manifest["compute_capabilities"] = []
        with pytest.raises(UserError, match=r"does not load .*engine\.plan \(.*the plan is damaged\)"):
            TrtSession(truncated)


def test_missing_cuda_bindings_name_the_command(engine, machine, monkeypatch):
    machine()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UserError, match="pip install 'cuda-bindings==12"):
        TrtSession(engine)
