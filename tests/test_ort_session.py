"""Packages on ONNX Runtime: stories260k, a trained model, against transformers; then what a session must refuse."""

import dataclasses
import os
import shutil
import sys
import types

import numpy as np
import onnxruntime
import pytest
import samples
import torch
from test_speculation import Eager
from transformers import AutoModelForCausalLM

from llmtrt import LLM, SamplingParams, files, quantize
from llmtrt.engine.manifest import ENGINE
from llmtrt.errors import CannotRunHere, UserError
from llmtrt.package import open_package
from llmtrt.runtime import memory
from llmtrt.runtime.onnxruntime import OrtSession
from llmtrt.runtime.scheduler import logits_of

PROMPTS = [
    "Once upon a time",
    "Lily",
    "One day, a little boy named Tim went to the park with his mom. He saw a big",
    "The dog",
]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages") / "fp32"
    return quantize(samples.stories260k(), folder, "fp32").package


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages") / "int4"
    return quantize(samples.stories260k(), folder, "int4").package


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(samples.stories260k()).eval()


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_logits_are_those_of_transformers(fp32, reference, chunk):
    with LLM(fp32.path, chunk=chunk, threads=1) as llm, torch.no_grad():
        ids = llm.encode(PROMPTS[2])
        expected = reference(torch.tensor([ids])).logits[0].numpy()
        logits = llm.logits(ids)
    assert logits.shape == expected.shape and logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.mark.parametrize("chunk", [3, 256])
def test_greedy_tokens_of_many_prompts_are_those_of_transformers(fp32, reference, chunk):
    with LLM(fp32.path, chunk=chunk, threads=1, max_batch=3) as llm:
        together = llm.generate(PROMPTS, SamplingParams(max_tokens=40))
        for prompt, done in zip(PROMPTS, together):
            ids = torch.tensor([llm.encode(prompt)])
            whole = reference.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0].tolist()
            assert done.token_ids == whole[ids.shape[1] :]
            assert llm.generate(prompt, SamplingParams(max_tokens=40)).token_ids == done.token_ids


def test_seeded_samples_are_those_of_each_alone(fp32):
    params = [SamplingParams(max_tokens=30, temperature=1.0, top_p=0.9, seed=seed) for seed in range(4)]
    with LLM(fp32.path, threads=1) as llm:
        together = llm.generate(PROMPTS, params)
        assert [llm.generate(*pair).token_ids for pair in zip(PROMPTS, params)] == [done.token_ids for done in together]


def test_prompts_that_share_their_start_and_a_next_turn_are_those_of_transformers(fp32, reference):
    """Five in two slots, whose starts are copied; then longer ones, which the cache has grown for."""
    start = " ".join(PROMPTS)
    with LLM(fp32.path, chunk=16, threads=1, max_batch=2) as llm:
        for _ in range(2):
            prompts = [start + end for end in ("", " The", " A dog", " She was very", " One day")]
            done = llm.generate(prompts, SamplingParams(max_tokens=25))
            for prompt, each in zip(prompts, done):
                ids = torch.tensor([llm.encode(prompt)])
                whole = reference.generate(ids, max_new_tokens=25, do_sample=False, pad_token_id=0)[0].tolist()
                assert each.token_ids == whole[ids.shape[1] :]
            start += done[1].text


def test_a_cache_that_is_kept_grows_in_any_direction(fp32):
    """A long prompt, then more that are short, then one that is longer still, whose start is the first's."""
    long = list(range(3, 303))
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM(fp32.path, threads=1, chunk=16) as llm, LLM(fp32.path, threads=1, chunk=16, reuse_prefixes=False) as cold:
        for prompts in ([long], [[5, 6], [7, 8], [9, 10]], [[*long, *range(20, 60)]], [[5, 6, 11]] * 2):
            warm = [done.token_ids for done in llm.generate(prompts, params)]
            assert warm == [done.token_ids for done in cold.generate(prompts, params)]
        assert llm._session._buffers[0].shape[:3:2] == (3, 340 + 4 + 16)


def test_a_cache_that_would_not_fit_beside_the_old_one_is_made_anew(fp32, monkeypatch):
    from llmtrt.runtime import onnxruntime as module

    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM(fp32.path, threads=1, chunk=16) as llm:
        room = llm._session._needed(1, 400)

        def available():
            taken = sum(buffer.nbytes for buffer in llm._session._buffers)
            return room - taken

        monkeypatch.setattr(module, "available_bytes", available)
        monkeypatch.setattr("llmtrt.runtime.memory.available_bytes", available)
        first = llm.generate(list(range(3, 203)), params)
        assert llm.generate(list(range(3, 303)), params).token_ids and first.token_ids


@pytest.mark.parametrize("prompt", [" ".join(PROMPTS[:2] * 2), PROMPTS[0]])
def test_speculation_changes_no_token(fp32, prompt):
    params = [SamplingParams(max_tokens=120, ignore_eos=True)]
    params += [SamplingParams(max_tokens=120, temperature=0.8, top_p=0.9, seed=2, ignore_eos=True)]
    eager = Eager()  # tries drafts whatever steps take on this machine, where they may be found not to pay
    with LLM(fp32.path, threads=1) as plain:
        for speculation in ("prompt-lookup", eager):
            with LLM(fp32.path, threads=1, speculation=speculation) as fast:
                for each in params:
                    assert fast.generate(prompt, each).token_ids == plain.generate(prompt, each).token_ids
    assert eager.accepted > 0
    with pytest.raises(UserError, match="speculation should be prompt-lookup, a Speculation or None, but is 'magic'"):
        LLM(fp32.path, speculation="magic")


def test_to_the_end_of_the_context(fp32, reference):
    with LLM(fp32.path, chunk=100, threads=1) as llm:
        ids = (llm.encode(" ".join(PROMPTS)) * 20)[:500]
        done = llm.generate(ids, SamplingParams(max_tokens=None, ignore_eos=True))
    assert (len(ids), len(done.token_ids), done.finish_reason) == (500, 12, "length")
    with torch.no_grad():
        assert done.token_ids == reference(torch.tensor([ids + done.token_ids])).logits[0].argmax(-1)[499:511].tolist()


def test_int4_answers_and_needs_no_torch(int4):
    with LLM(int4.path, threads=1) as llm:
        assert int4.manifest["quantization"]["tensors"]["model.layers.0.self_attn.q_proj.weight"]["form"] == "int4"
        text = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30)).text
        assert text.startswith(", there was a")


def test_cache_is_updated_in_place(fp32):
    session = OrtSession(fp32, threads=1, chunk=8)
    session.reserve(2, 20)
    assert session._buffers[0].shape == (2, 4, 28, 8) and len(session._buffers) == 10
    addresses = [buffer.ctypes.data for buffer in session._buffers]
    index = np.zeros((2, 1), np.int64)
    session.step(np.full((2, 3), 5, np.int64), np.array([[0, 1, 2], [4, 5, 6]]), index)
    written = [np.flatnonzero(np.abs(session._buffers[0][slot]).max((0, 2))).tolist() for slot in range(2)]
    assert written == [[0, 1, 2], [4, 5, 6]]
    before = [buffer.copy() for buffer in session._buffers]
    session.step(np.full((2, 1), 9, np.int64), np.array([[3], [27]]), index)  # 27 is the last row
    for buffer, old in zip(session._buffers, before):
        changed = (buffer != old).any((1, 3))
        assert np.flatnonzero(changed[0]).tolist() == [3] and np.flatnonzero(changed[1]).tolist() == [27]
    bound = [value.data_ptr() for value in session._bound(0, 2).get_outputs()]
    assert bound[:-1] == addresses  # outputs are the very buffers that the inputs are
    session.close()
    session.close()
    with pytest.raises(UserError, match="fp32 is closed: load it again"):
        session.reserve(2, 20)


def test_no_operator_copies_the_cache(fp32, monkeypatch, capfd):
    """ONNX Runtime warns when TensorScatter copies; the second step shows that this test would see it."""
    session_class = onnxruntime.InferenceSession

    def warning(path, options, **rest):
        options.log_severity_level = 2
        return session_class(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", warning)
    session = OrtSession(fp32, threads=1)
    session.reserve(2, 20)
    zeros = np.zeros((2, 1), np.int64)
    session.step(zeros, zeros, zeros)
    assert "TensorScatter" not in capfd.readouterr().err
    session._bound(0, 2).bind_output("present_key_0", "cpu")
    session.step(zeros, zeros, zeros)
    assert "in-place optimization not activated" in capfd.readouterr().err


def test_padding_changes_nothing(fp32):
    """Garbage past a slot's own length, NaN-free but huge, must not reach its logits."""
    session = OrtSession(fp32, threads=1, chunk=8)
    ids = np.array([1, 40, 300, 77, 80], np.int64)
    (alone,) = logits_of(session, ids, 8)
    session.reserve(2, 16)
    padded = np.zeros((2, 8), np.int64)
    padded[:, :5] = ids
    padded[1, 5:] = [9, 10, 11]
    first = session.step(padded, np.tile(np.arange(8), (2, 1)), np.full((2, 1), 4))
    np.testing.assert_allclose(first, np.tile(alone[4], (2, 1, 1)), atol=1e-5)
    for buffer in session._buffers:
        buffer[:, :, 6:] = 1e4
    again = session.step(np.array([[33], [33]]), np.array([[5], [5]]), np.zeros((2, 1), np.int64))
    (longer,) = logits_of(session, np.append(ids, 33), 8)
    np.testing.assert_allclose(again, np.tile(longer[5], (2, 1, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("layers", 4, "has an unknown input past_key_4"),
        ("layers", 6, "lacks the input past_key_5"),
        ("kv_heads", 2, "past_key_0"),
        ("head_dim", 16, "past_key_0"),
        ("kv_dtype", "float16", "past_key_0"),
        ("vocab_size", 600, "logits"),
        ("dtype", "bfloat16", "TensorRT only"),
    ],
)
def test_a_graph_that_contradicts_its_manifest(fp32, field, value, match):
    wrong = dataclasses.replace(fp32, spec=dataclasses.replace(fp32.spec, **{field: value}))
    with pytest.raises(UserError, match=match):
        OrtSession(wrong, threads=1)


def test_without_onnxruntime(fp32, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(UserError, match=r'1.23.2 is too old.*pip install "onnxruntime>=1.24"'):
        LLM(fp32.path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="cannot be imported.*pip install"):
        LLM(fp32.path)


def test_too_little_memory_is_told_with_numbers(fp32, monkeypatch):
    llm = LLM(fp32.path, threads=1)
    monkeypatch.setattr(memory, "available_bytes", lambda: 100_000)
    with pytest.raises(UserError, match=r"KV cache of 1 × .* tokens needs about 0.00 GiB.*0.00 GiB are available"):
        llm.generate(PROMPTS[0])
    with pytest.raises(UserError, match="loading"):
        LLM(fp32.path, threads=1)


def test_available_memory_is_below_what_the_machine_has():
    assert 0 < memory.available_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_bad_graph_and_options(fp32, tmp_path):
    folder = tmp_path / "package"
    shutil.copytree(fp32.path, folder)
    (folder / "model.onnx").write_bytes(b"\x08\x0bnonsense")
    with pytest.raises(UserError, match="model.onnx"):
        LLM(folder)
    with pytest.raises(UserError, match="cannot load .*model.onnx"):
        LLM(folder, verify=False)
    for options in (
        {"threads": 0},
        {"threads": "2"},
        {"accuracy_level": 7},
        {"accuracy_level": True},
        {"chunk": 0},
        {"chunk": "a"},
        {"chunk": 2.5},
    ):
        with pytest.raises(UserError, match=f"{next(iter(options))} should be"):
            LLM(fp32.path, **options)
    with pytest.raises(UserError, match="llmtrt build"):
        LLM(fp32.path, runtime="tensorrt")


def test_weights_outside_the_package_are_not_read(fp32, tmp_path):
    import onnx

    folder = tmp_path / "package"
    shutil.copytree(fp32.path, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    assert entries
    shutil.copy(folder / "model.onnx.data", tmp_path / "secret")
    for entry in entries:
        entry.value = "../secret"
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(UserError, match="escapes model directory"):
        LLM(folder, verify=False)


@pytest.fixture
def engine(fp32, tmp_path, monkeypatch):
    """An engine folder whose plan runs nowhere, beside a TensorRT session that says so."""

    class TrtSession:
        def __init__(self, engine, verify, **options):
            raise CannotRunHere("there is no GPU") if engine.max_batch == 2 else UserError("the plan is damaged")

    monkeypatch.setitem(sys.modules, "llmtrt.runtime.tensorrt", types.SimpleNamespace(TrtSession=TrtSession))
    folder = tmp_path / "engine"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(fp32.path / name, folder)
    for name in ("engine.plan", "greedy.plan", "sampler.plan"):
        (folder / name).write_bytes(b"plan")
    digests = {path.name: files.digest_file(path) for path in folder.iterdir()}
    manifest = {
        "format": "llmtrt-engine", "format_version": ENGINE.version, "files": digests, "generation": {},
        "model": fp32.spec.to_json(),
        "package": {"path": str(fp32.path), "sha256": fp32.digest}, "flavor": {"name": "rtx", "version": "1.6.1"},
        "compute_capabilities": [], "lowerings": [], "flags": [],
        "profiles": [{"name": name, "shapes": {"input_ids": [[1, 1]] * 3}} for name in ("decode", "prefill")],
        "runtime": {}, "debug_tensors": [],
        "weight_inputs": {}, "one_row": None, "memory": {"weights": None, "activations": None, "largest_weight": 0},
        "max_batch": 2, "max_seq": 128, "chunk": 64, "capacity": 192, "check_rows": 16,
    }  # fmt: skip
    files.write_json(folder / "manifest.json", manifest)
    return folder


def test_an_engine_that_is_wrong_is_not_replaced(engine):
    """ONNX Runtime stands in for a machine, not for a plan that is damaged or a flag that is wrong."""
    manifest = files.read_json(engine / "manifest.json")
    files.write_json(engine / "manifest.json", manifest | {"max_batch": 1})
    with pytest.raises(UserError, match="^the plan is damaged$"):
        LLM(engine)
    with LLM(engine, runtime="onnxruntime") as llm:
        assert llm.notice is None


def test_an_engine_without_a_gpu_runs_its_package(engine, fp32):
    with LLM(engine, threads=1) as llm:
        assert "ONNX Runtime" in llm.runtime
        assert "there is no GPU" in llm.notice and str(fp32.path) in llm.notice
        assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=5)).text
    with LLM(engine, runtime="onnxruntime") as llm:
        assert llm.notice is None
    assert LLM(fp32.path).notice is None
    with pytest.raises(UserError, match="^there is no GPU$"):
        LLM(engine, runtime="tensorrt")


def test_an_engine_whose_package_is_another_by_now(engine):
    manifest = files.read_json(engine / "manifest.json")
    manifest["package"]["sha256"] = "0" * 64
    files.write_json(engine / "manifest.json", manifest)
    with pytest.raises(UserError, match="there is no GPU.*is not found"):
        LLM(engine)


def test_opening_again_verifies(fp32, tmp_path):
    folder = tmp_path / "package"
    shutil.copytree(fp32.path, folder)
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    with pytest.raises(UserError, match="model.onnx.data is corrupt"):
        LLM(folder)
    with LLM(folder, verify=False) as llm:
        assert llm.spec == open_package(fp32.path).spec
