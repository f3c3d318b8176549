"""Weights of another package in an engine: what fits, what the refitter reads, and what is written; on a TensorRT of
stand-ins, since refitting needs a GPU."""

import hashlib
import json
import os
import re
import types
from pathlib import Path

import families
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file, save_file

from llmtrt import files
from llmtrt.cli.main import main
from llmtrt.engine import refit as refitting
from llmtrt.engine.flavor import Flavor
from llmtrt.engine.gpu import Gpu, Gpus
from llmtrt.engine.manifest import ENGINE, open_engine
from llmtrt.engine.refit import refit_engine, refit_graph
from llmtrt.errors import UserError
from llmtrt.graph.lowering import Target, lower
from llmtrt.graph.structure import load_graph, structure_digest, weights
from llmtrt.manifest import write_manifest
from llmtrt.package import Package, open_package
from llmtrt.quantization.pipeline import quantize
from llmtrt.quantization.recipe import Recipe

INT4 = Recipe(group_size=16)
CAPACITY, MAX_SEQ, CHUNK = 80, 64, 16
LAYERS = range(families.SIZES["num_hidden_layers"])


def make_package(folder: Path, family: str, recipe="fp32", seed=None, change=None, max_seq=None, **config) -> Package:
    """A package of a tiny model: of other weights with a ``seed``, with what ``change`` makes of its tensors, and with
    ``config`` in its config.json."""
    checkpoint = families.save(family, folder / "checkpoint", **config)
    tensors = load_file(checkpoint / "model.safetensors")
    if seed is not None:
        rng = np.random.default_rng(seed)
        tensors = {n: t * rng.normal(1, 0.3, t.shape).astype(t.dtype) for n, t in sorted(tensors.items())}
    save_file(change(tensors) if change else tensors, checkpoint / "model.safetensors")
    return quantize(checkpoint, folder / "package", recipe, max_seq).package


def make_engine(folder: Path, package: Package, *flags: str, **package_fields) -> Path:
    """What build would write for ``package``, but for the plans."""
    folder.mkdir()
    canonical = load_graph(package)
    structure = structure_digest(canonical)
    model, lowerings = lower(canonical, Target("rtx", frozenset(), CAPACITY))
    ir.save(model, folder / "graph.onnx")
    for name in ("engine.plan", "greedy.plan", "sampler.plan", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_bytes(name.encode())
    fields = {
        "flavor": {"name": "rtx", "version": "1.6.1"},
        "compute_capabilities": [],
        "flags": list(flags),
        "lowerings": lowerings,
        "runtime": {},
        "profiles": [{"name": name, "shapes": {"input_ids": [[1, 1]] * 3}} for name in ("decode", "prefill")],
        "debug_tensors": [],
        "weight_inputs": {},
        "one_row": None,
        "memory": {"weights": 5, "activations": [7, 8], "largest_weight": 9},
        "max_batch": 2,
        "max_seq": MAX_SEQ,
        "chunk": CHUNK,
        "capacity": CAPACITY,
        "check_rows": 8,
        "model": package.spec.to_json(),
        "generation": {},
        "producer": "llmtrt of old",
        "package": {
            "path": os.path.relpath(package.path, folder),
            "sha256": package.digest,
            "structure": structure,
        }
        | package_fields,
    }
    write_manifest(folder, ENGINE, fields)
    return folder


def realigned(package: Package, folder: Path) -> Package:
    """The same package, its weights in another order and at odd places of its data file."""
    folder.mkdir()
    model, data = ir.load(package.graph), b""
    for name, tensor in reversed(weights(model).items()):
        if isinstance(tensor, ir.ExternalTensor):
            data += b"\xff" * 77
            value = model.graph.initializers[name]
            value.const_value = ir.ExternalTensor(
                "model.onnx.data",
                len(data),
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=name,
                base_dir=folder,
            )
            data += tensor.tobytes()
    (folder / "model.onnx.data").write_bytes(data)
    ir.save(model, folder / "model.onnx")
    manifest = dict(package.manifest)
    manifest["files"] = {name: files.digest_file(folder / name) for name in ("model.onnx", "model.onnx.data")}
    files.write_json(folder / "manifest.json", manifest)
    return open_package(folder)


def logits(graph: bytes, package: Package) -> np.ndarray:
    """Of 12 tokens, by ONNX Runtime, which finds the external data of ``graph`` in the package's folder."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(package.path))
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    rows = np.arange(12)[None]
    feeds = {"input_ids": rows * 7 % 97, "positions": rows, "logits_index": rows, "kv_range": np.arange(CAPACITY)}
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            kind = np.float16 if "float16" in value.type else np.float32
            feeds[value.name] = np.zeros((1, *value.shape[1:]), kind)
    return session.run(["logits"], feeds)[0]


def lowered(package: Package) -> bytes:
    return ir.to_proto(lower(load_graph(package), Target("rtx", frozenset(), CAPACITY))[0]).SerializeToString()


def test_packages_of_other_weights_have_one_structure(tmp_path):
    one, same, other = (
        make_package(tmp_path / name, "qwen2-tied", INT4, seed) for name, seed in (("a", None), ("b", None), ("c", 1))
    )
    digests = [structure_digest(load_graph(package)) for package in (one, same, other)]
    assert one.digest == same.digest != other.digest
    assert len(set(digests)) == 1 and len(digests[0]) == 64
    base = make_package(
        tmp_path / "base", "qwen2-tied", INT4, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}
    )
    tables = [weights(load_graph(package))["rope_0.inv_freq"].numpy() for package in (one, base)]
    assert not np.array_equal(*tables)  # a fine-tune for longer contexts has other frequencies, which are weights
    assert structure_digest(load_graph(base)) == digests[0]
    moved = realigned(one, tmp_path / "moved")
    assert structure_digest(load_graph(moved)) == digests[0]


def test_all_that_is_not_weights_changes_the_structure(tmp_path):
    def two_layers(tensors):
        return {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}

    def with_biases(tensors):
        names = [name for name in tensors if "self_attn" in name]
        return tensors | {name.replace("weight", "bias"): tensors[name][:, 0].copy() for name in names}

    variants = {
        "as it is": {},
        "a layer less": dict(change=two_layers, num_hidden_layers=2),
        "eps": dict(rms_norm_eps=1e-3),
        "biases": dict(change=with_biases, attention_bias=True),
        "int4": dict(recipe=INT4),
        "an int8 head": dict(recipe=Recipe(group_size=16, lm_head="int8")),
        "fp16": dict(recipe="fp16"),
    }
    digests = {
        name: structure_digest(load_graph(make_package(tmp_path / name, "llama-mha-untied", **options)))
        for name, options in variants.items()
    }
    assert len(set(digests.values())) == len(variants), digests


def test_the_structure_has_the_values_of_constants_and_attributes(tmp_path):
    package = make_package(tmp_path, "mistral", "fp16")

    def digest(change):
        model = ir.load(package.graph)
        change(model)
        return structure_digest(model)

    def other_constant(model):
        value = next(value for name, value in model.graph.initializers.items() if name.startswith("constant/"))
        value.const_value = ir.tensor(value.const_value.numpy() + 1, name=value.name)

    def other_name(model):
        next(iter(model.graph)).outputs[0].name = "renamed"

    def other_attribute(model):
        node = next(node for node in model.graph if node.op_type == "Cast")
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.DOUBLE))

    def other_opset(model):
        model.graph.opset_imports[""] = 23

    def other_input(model):
        model.graph.inputs[0].shape = ir.Shape(["B", 5])

    def other_order(model):
        first = next(iter(model.graph))
        last = next(reversed(model.graph))
        model.graph.remove(first)
        model.graph.insert_after(last, first)

    changes = (other_constant, other_name, other_attribute, other_opset, other_input, other_order)
    digests = {structure_digest(load_graph(package)), *map(digest, changes)}
    assert len(digests) == 1 + len(changes)
    assert digest(lambda model: setattr(model, "producer_name", "another")) in digests


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("mistral", INT4),
        ("llama-biases", "fp32"),
        ("qwen2-tied", Recipe(group_size=16, embedding="int8", lm_head="int8")),
    ],
)
def test_the_graph_that_is_refitted_computes_what_the_other_package_does(tmp_path, family, recipe):
    own, other = make_package(tmp_path / "a", family, recipe), make_package(tmp_path / "b", family, recipe, seed=1)
    engine = open_engine(make_engine(tmp_path / "engine", own, "REFIT_INDIVIDUAL"))
    moved = realigned(other, tmp_path / "moved")
    wanted = logits(lowered(other), other)
    assert np.isfinite(wanted).all() and not np.array_equal(wanted, logits(lowered(own), own))
    for package in (other, moved):
        assert np.array_equal(logits(refit_graph(engine, package), package), wanted)
    assert refit_graph(engine, own) == (engine.path / "graph.onnx").read_bytes()


def other_vocabulary_without_mlp_biases(tensors):
    kept = {name: tensor for name, tensor in tensors.items() if not (".mlp." in name and name.endswith(".bias"))}
    grown = ("model.embed_tokens.weight", "lm_head.weight")
    return kept | {name: np.concatenate([tensors[name], tensors[name][:1]]) for name in grown}


def test_every_weight_that_does_not_fit_is_named(tmp_path):
    own = make_package(tmp_path / "a", "llama-biases", "fp16")
    other = make_package(
        tmp_path / "b",
        "llama-biases",
        "fp16",
        change=other_vocabulary_without_mlp_biases,
        vocab_size=98,
        mlp_bias=False,
    )
    engine = open_engine(make_engine(tmp_path / "engine", own, "REFIT_INDIVIDUAL"))
    with pytest.raises(UserError) as caught:
        refit_graph(engine, other)
    begin, end = f"{other.path} does not fit {engine.path}: ", ": build an engine from this package"
    told = str(caught.value)
    assert told.startswith(begin) and told.endswith(end)
    sizes = {"gate_proj": 80, "up_proj": 80, "down_proj": 40}
    assert sorted(told[len(begin) : -len(end)].split("; ")) == sorted(
        [
            "model.embed_tokens.weight should be float16 [97, 40], but is float16 [98, 40]",
            "lm_head.weight should be float16 [97, 40], but is float16 [98, 40]",
        ]
        + [
            f"model.layers.{layer}.mlp.{name}.bias should be float16 [{size}], but is missing"
            for layer in LAYERS
            for name, size in sizes.items()
        ]
    )
    back = open_engine(make_engine(tmp_path / "back", other, "REFIT_INDIVIDUAL"))
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj\.bias, float16 \[80\], has no place in the engine"):
        refit_graph(back, own)


def test_another_architecture_whose_weights_would_fit_is_refused(tmp_path):
    own, other = make_package(tmp_path / "a", "mistral"), make_package(tmp_path / "b", "mistral", rms_norm_eps=1e-3)
    engine = open_engine(make_engine(tmp_path / "engine", own, "REFIT_INDIVIDUAL"))
    with pytest.raises(UserError, match="its graph has another structure, so it is another architecture"):
        refit_graph(engine, other)


@pytest.mark.parametrize(
    ("flags", "fields", "message"),
    [
        ((), {}, "built with its weights fixed: build it anew with --refit any"),
        (
            ("REFIT_IDENTICAL", "STRIP_PLAN"),
            {},
            "only the weights of the package that it was built from.*--refit any",
        ),
        (("REFIT_INDIVIDUAL",), {"structure": None}, "does not tell the structure.*build it anew"),
    ],
)
def test_an_engine_that_takes_no_other_weights_says_so(tmp_path, flags, fields, message):
    own, other = make_package(tmp_path / "a", "mistral"), make_package(tmp_path / "b", "mistral", seed=1)
    engine = open_engine(make_engine(tmp_path / "engine", own, *flags, **fields))
    with pytest.raises(UserError, match=message):
        refit_graph(engine, other)


def test_a_package_for_shorter_contexts_is_refused(tmp_path):
    own = make_package(tmp_path / "a", "mistral")
    engine = open_engine(make_engine(tmp_path / "engine", own, "REFIT_INDIVIDUAL"))
    short = make_package(tmp_path / "b", "mistral", max_seq=MAX_SEQ - 1)
    with pytest.raises(UserError, match="for up to 63 tokens and .* for 64: make the package anew with --max-seq 64"):
        refit_graph(engine, short)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("location", "../secret", "'../secret' is not a plain file name"),
        ("location", "unlisted", "lies in unlisted, which the manifest does not list"),
        ("offset", str(1 << 40), "reaches beyond the end of model.onnx.data"),
        ("length", str(1 << 40), "reaches beyond the end of model.onnx.data"),
    ],
)
def test_weights_come_from_the_package_alone(tmp_path, entry, value, message):
    own, other = make_package(tmp_path / "a", "mistral"), make_package(tmp_path / "b", "mistral", seed=1)
    engine = open_engine(make_engine(tmp_path / "engine", own, "REFIT_INDIVIDUAL"))
    model = onnx.load(other.graph, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(each for each in tensor.external_data if each.key == entry).value = value
    other.graph.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=message):
        refit_graph(engine, other)


def contents(graph: bytes, folder: Path) -> dict[str, str]:
    """Weight → SHA-256 of the bytes that a reader of ``graph`` finds beside it in ``folder``."""
    model = ir.from_proto(onnx.ModelProto.FromString(graph))
    ir.external_data.set_base_dir(model.graph, folder)
    return {name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in weights(model).items()}


class FakeTensorRT(types.ModuleType):
    """A TensorRT whose plans are the digests of their weights, which its refitter reads as the parser's would."""

    SerializationFlag = types.SimpleNamespace(EXCLUDE_WEIGHTS="exclude", INCLUDE_REFIT="refit")

    def __init__(self, lacking=(), complete=True, refits=True, writes=True):
        super().__init__("tensorrt_rtx")
        self.serialized_with = None
        outer = self

        class ILogger:
            Severity = types.SimpleNamespace(ERROR=1)

        class Runtime:
            engine_host_code_allowed = False

            def __init__(self, logger):
                outer.runtime = self

            def deserialize_cuda_engine(self, plan):
                return FakeEngine()

        class FakeEngine:
            weights, filled = {}, False

            def create_serialization_config(self):
                flags = {"exclude"}
                return types.SimpleNamespace(flags=flags, clear_flag=flags.discard, set_flag=flags.add)

            def serialize_with_config(self, config):
                assert self.filled
                outer.serialized_with = config.flags
                return memoryview(json.dumps(self.weights).encode()) if writes else None

        class Refitter:
            def __init__(self, engine, logger):
                self.engine = engine

            def get_missing_weights(self):
                return list(lacking)

            def refit_cuda_engine(self):
                self.engine.filled = refits
                return refits

        class OnnxParserRefitter:
            num_errors = 0

            def __init__(self, refitter, logger):
                self.engine = refitter.engine

            def refit_from_bytes(self, graph, path):
                self.engine.weights = contents(graph, Path(path).parent)
                return complete

        self.ILogger, self.Runtime = ILogger, Runtime
        self.Refitter, self.OnnxParserRefitter = Refitter, OnnxParserRefitter


@pytest.fixture
def machine(monkeypatch):
    """``machine(…)``: a GPU and a FakeTensorRT of these options."""

    def replace(**options):
        def choose(name, need):
            assert (name, need) == ("rtx==1.6.1", "refit")
            return Flavor("rtx", "1.6.1", trt, frozenset({"refit"}))

        trt = FakeTensorRT(**options)
        monkeypatch.setattr(refitting, "choose", choose)
        monkeypatch.setattr(refitting, "find_gpus", lambda: Gpus((Gpu(0, "Fake GPU", "8.9", 1 << 30),)))
        return trt

    return replace


def test_a_stripped_engine_is_written_with_another_packages_weights(tmp_path, machine):
    trt = machine()
    own, other = make_package(tmp_path / "a", "mistral", INT4), make_package(tmp_path / "b", "mistral", INT4, seed=1)
    moved = realigned(other, tmp_path / "moved")
    (moved.path / "tokenizer.json").write_text("theirs")
    manifest = moved.manifest | {"generation": {"top_k": 5}}
    manifest["files"] |= {"tokenizer.json": files.digest_file(moved.path / "tokenizer.json")}
    files.write_json(moved.path / "manifest.json", manifest)
    moved = open_package(moved.path)
    old = make_engine(tmp_path / "engine", own, "REFIT_INDIVIDUAL", "STRIP_PLAN", "WEIGHT_STREAMING")
    # A plan that streams is read through one of TensorRT's own classes.
    trt.IStreamReaderV2 = object
    new = refit_engine(old, moved.path, tmp_path / "deep" / "new")
    assert trt.serialized_with == {"refit"}
    assert json.loads(new.plan.read_bytes()) == contents(moved.graph.read_bytes(), moved.path)
    assert new == open_engine(new.path)
    assert new.package_path == moved.path.resolve() and not new.stripped and new.refittable
    assert new.manifest["flags"] == ["REFIT_INDIVIDUAL", "WEIGHT_STREAMING"]
    assert new.generation == {"top_k": 5} and new.weight_bytes == new.plan.stat().st_size
    assert new.manifest["memory"]["activations"] == [7, 8] and new.manifest["producer"] != "llmtrt of old"
    assert (new.path / "greedy.plan").read_bytes() == b"greedy.plan"
    assert (new.path / "tokenizer.json").read_text() == "theirs"
    assert not (new.path / "chat_template.jinja").exists()  # the old tokenizer's
    # What it was filled from is its own package now: the graph beside it has that one's offsets.
    again = refit_engine(new.path, moved.path, tmp_path / "again")
    assert again.plan.read_bytes() == new.plan.read_bytes()
    back = refit_engine(new.path, own.path, tmp_path / "back")
    assert json.loads(back.plan.read_bytes()) == contents(own.graph.read_bytes(), own.path)


def test_an_engine_for_identical_weights_is_filled_once(tmp_path, machine, capsys):
    trt = machine()
    own = make_package(tmp_path / "a", "mistral")
    old = make_engine(tmp_path / "engine", own, "REFIT_IDENTICAL", "STRIP_PLAN")
    new = tmp_path / "new"
    assert main(["refit", str(old), "--package", str(own.path), "-o", str(new)]) == 0
    size = (new / "engine.plan").stat().st_size
    told = f"{new}: weights of {own.path}, plan of {size / 1e6:.1f} MB, written in "
    assert re.fullmatch(re.escape(told) + r"\d+ s\n", capsys.readouterr().out)
    engine = open_engine(new)
    assert trt.serialized_with == set() and engine.manifest["flags"] == []
    assert json.loads(engine.plan.read_bytes()) == contents(own.graph.read_bytes(), own.path)
    assert not (new / "graph.onnx").exists() and (new / "tokenizer.json").read_bytes() == b"tokenizer.json"
    with pytest.raises(UserError, match="built with its weights fixed"):
        refit_engine(new, own.path, tmp_path / "never")
    assert main(["refit", str(old), "--package", str(own.path), "-o", str(tmp_path / "json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["flags"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lacking=["a.weight", "b.weight"]), "could not be filled .*nothing was given for a.weight, b.weight"),
        (dict(complete=False), "could not be filled from .*TensorRT gives no reason"),
        (dict(refits=False), "could not be filled from .*TensorRT gives no reason"),
        (dict(writes=False), "could not be written with its weights"),
    ],
)
def test_what_tensorrt_cannot_do_leaves_nothing(tmp_path, machine, options, message):
    machine(**options)
    own = make_package(tmp_path / "a", "mistral")
    old = make_engine(tmp_path / "engine", own, "REFIT_INDIVIDUAL")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message):
        refit_engine(old, own.path, tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == before


def test_host_code_runs_only_where_it_is_trusted(tmp_path, machine, capsys):
    trt = machine()
    own = make_package(tmp_path / "a", "mistral")
    old = make_engine(tmp_path / "engine", own, "REFIT_INDIVIDUAL", "VERSION_COMPATIBLE")
    command = ["refit", str(old), "--package", str(own.path), "-o", str(tmp_path / "new")]
    assert main(command) == 2 and "pass --trust-host-code" in capsys.readouterr().err
    assert main([*command, "--trust-host-code"]) == 0 and trt.runtime.engine_host_code_allowed


def test_without_a_gpu_it_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(refitting, "find_gpus", lambda: Gpus((), problem="the driver sleeps"))
    assert main(["refit", "engine", "--package", "package", "-o", str(tmp_path / "new")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == (
        "llmtrt refit: error: refitting needs an NVIDIA GPU, but the driver sleeps: run it where there is one\n"
    )
    assert os.listdir(tmp_path) == []


def test_it_is_public():
    import llmtrt

    assert llmtrt.refit is refit_engine
