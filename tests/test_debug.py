"""`llmtrt debug`: the first tensor of a damaged layer is the one that is named, and a sound engine is inside its bands."""

import json
import shutil
import tempfile

import families
import numpy as np
import onnx_ir as ir
import pytest
import samples

from llmtrt.cli.main import main
from llmtrt.engine.build import build
from llmtrt.engine.gpu import Gpus
from llmtrt.errors import UserError
from llmtrt.evaluate.debug import PATTERNS, compare, measure
from llmtrt.graph.expose import exposable, expose
from llmtrt.graph.lowering import Target, lower
from llmtrt.graph.structure import load_graph
from llmtrt.package import open_package
from llmtrt.quantization.pipeline import quantize
from llmtrt.runtime.onnxruntime import OrtSession

IDS = np.arange(3, 15)
CHUNK = 16


@pytest.fixture(scope="module", params=["fp32", "fp16", "int4-g32"])
def package(request, tmp_path_factory):
    """A Llama of 3 layers."""
    return made(request.param, tmp_path_factory.mktemp("package"))


def made(recipe, folder):
    checkpoint = families.save("llama-gqa-tied", folder / "checkpoint")
    return quantize(checkpoint, folder / "package", recipe).package


class StandIn(OrtSession):
    """A cache of as many rows as the graph was lowered for."""

    rows = 0

    def reserve(self, slots, max_seq):
        super().reserve(slots, self.rows - self.chunk)


def stand_in(package, damage=lambda model: None, patterns=PATTERNS, max_seq=32, chunk=CHUNK) -> OrtSession:
    """What an engine for RTX would compute, but on ONNX Runtime, after ``damage`` to the lowered graph."""
    model, _ = lower(load_graph(package), Target("rtx", frozenset(), max_seq + chunk))
    count = len(expose(model, patterns))
    damage(model)
    shown = [value.name for value in model.graph.outputs[-count:]]
    graph = ir.to_proto(model).SerializeToString()
    session = StandIn(package, accuracy_level=1, chunk=chunk, graph=graph, debug_tensors=shown)
    session.rows = max_seq + chunk
    return session


def weight(name, change):
    """Damage to one weight (of INT4 blocks: to their scales)."""

    def damage(model):
        names = [each for each in model.graph.initializers if each.startswith(name)]
        value = model.graph.initializers[next((each for each in names if "scale" in each), names[0])]
        array = value.const_value.numpy().copy()
        change(array)
        value.const_value = ir.tensor(array, name=value.name)

    return damage


def double(array):
    array *= 2


def nan(array):
    array.flat[5] = np.nan


def other_node(name, kind):
    def damage(model):
        next(node for node in model.graph if node.name == name).op_type = kind

    return damage


def test_a_sound_engine_is_inside_its_bands(package):
    found = compare(package, stand_in(package), IDS)
    assert found.first is None and found.left_out == []
    layers = [each.layer for each in found.differences]
    assert layers == [0] * 4 + [1] * 4 + [2] * 4 + [None]
    assert found.differences[1].name == "model.layers.0/Add" and found.differences[1].shape == (1, len(IDS), 48)
    assert found.differences[-1].name == "logits" and found.differences[-1].largest > 1
    assert found.worst.error < {"float16": 1e-2, "float32": 1e-5}[package.spec.dtype]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(
    "damage, name",
    [
        (lambda i: weight(f"model.layers.{i}.input_layernorm.weight", double), "{}.input_layernorm/RMSNormalization"),
        (lambda i: weight(f"model.layers.{i}.self_attn.o_proj.weight", double), "{}/Add"),
        (lambda i: other_node(f"model.layers.{i}.mlp/Sigmoid", "Tanh"), "{}/Add_2"),
    ],
)
def test_the_first_tensor_of_the_damaged_layer_is_named(package, layer, damage, name):
    first = compare(package, stand_in(package, damage(layer)), IDS).first
    assert (first.name, first.layer) == (name.format(f"model.layers.{layer}"), layer)
    assert first.error > first.band and not first.not_finite
    assert abs(first.value - first.reference) == pytest.approx(first.error * first.largest, rel=1e-3)


def test_every_tensor_of_a_layer_can_be_looked_at(package):
    patterns = ("model.layers.1.*",)
    damage = weight("model.layers.1.mlp.up_proj.weight", double)
    session = stand_in(package, damage, patterns)
    found = compare(package, session, IDS, patterns)
    assert {each.layer for each in found.differences[:-1]} == {1}
    assert found.first.name.startswith("model.layers.1.mlp.up_proj/")
    names = [each.name for each in found.differences]
    assert "model.layers.1.self_attn/Attention" in names and not any("Dequantize" in name for name in names)
    narrower = compare(package, session, IDS, ["*/Attention"])
    assert [each.name for each in narrower.differences] == ["model.layers.1.self_attn/Attention", "logits"]


def test_nan_is_outside_every_band(package):
    session = stand_in(package, weight("model.layers.1.mlp.down_proj.weight", nan))
    first = compare(package, session, IDS, band=1e9).first
    assert (first.name, first.error, np.isnan(first.value)) == ("model.layers.1/Add_2", np.inf, True)
    assert first.not_finite == len(IDS) and np.isfinite(first.reference)


def test_the_band_is_the_callers_where_given(package):
    found = compare(package, stand_in(package, weight("model.layers.1.mlp.down_proj.weight", double)), IDS, band=1e9)
    assert found.first is None and found.worst.error > 0.05


def test_a_tensor_that_only_one_of_them_has_is_left_out(package):
    def rename(model):
        next(
            value for value in exposable(model) if value.name == "model.layers.1/Add"
        ).name = "model.layers.1/Add_lowered"

    found = compare(package, stand_in(package, rename), IDS)
    assert found.left_out == ["model.layers.1/Add_lowered"] and found.first is None


def test_measure():
    reference = np.array([[1, -4], [np.inf, 0]], np.float16)
    same = measure("present_key_3", reference.copy(), reference, 0.1)
    assert (same.error, same.layer, same.reference_not_finite, same.not_finite) == (0, 3, 1, 0)
    off = measure("logits", np.array([[1, -3], [5, 0]], np.float16), reference, 0.1)
    assert (off.error, off.place, off.largest, off.layer, off.dtype) == (0.25, (0, 1), 4, None, "float16")
    zero = measure("model.layers.12.mlp/Mul", np.full(3, 0.5, np.float32), np.zeros(3, np.float32), 0.1)
    assert (zero.error, zero.layer, zero.outside) == (0.5, 12, True)


def test_a_pattern_that_matches_nothing_and_a_long_prompt_are_refused(package):
    session = stand_in(package)
    with pytest.raises(UserError, match=r"--tensors 'model\.layers\.7\.\*': none of the engine's 12"):
        compare(package, session, IDS, ["*/Add", "model.layers.7.*"])
    with pytest.raises(UserError, match="the prompt has 17 tokens and one step of the engine takes 16: .*--chunk 17"):
        compare(package, session, range(17))
    with pytest.raises(UserError, match="the prompt is empty"):
        compare(package, session, [])


# The command line: real engines for RTX, built ahead of time; a stand-in runs the graph that they were built from.


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    pytest.importorskip("tensorrt_rtx_bindings")
    return quantize(samples.stories260k(), tmp_path_factory.mktemp("stories") / "package", "int4-g32").package


@pytest.fixture
def debug(monkeypatch, capsys, tmp_path):
    """``debug(*arguments, damage=…)``: exit code, stdout, stderr, on a machine that seems to have a GPU."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def run(*arguments, damage=lambda model: None, problem=""):
        def session(engine, **options):
            package = open_package(engine.package_path)
            assert engine.spec == package.spec
            return stand_in(package, damage, engine.debug_tensors, engine.max_seq, engine.chunk)

        capsys.readouterr()
        monkeypatch.setattr("llmtrt.engine.gpu.find_gpus", lambda: Gpus((), problem=problem))
        monkeypatch.setattr("llmtrt.runtime.tensorrt.TrtSession", session)
        code = main(["debug", *map(str, arguments)])
        assert list((tmp_path / "temporary").iterdir()) == []
        return code, *capsys.readouterr()

    return run


PROMPT = ("-p", "Once upon a time")
UP = "model.layers.1.mlp.up_proj.weight"


def test_a_package_is_built_for_the_occasion(stories, debug):
    code, said, _ = debug(stories.path, *PROMPT)
    assert (code, said.count("\n")) == (0, 1) and said.startswith("all 21 tensors within their bands, worst ")


def test_a_finding_is_told_in_full(stories, debug):
    damage = weight("model.layers.1.self_attn.o_proj.weight", double)
    code, said, _ = debug(stories.path, *PROMPT, "--all", damage=damage)
    *lines, first, error, worst = said.splitlines()
    assert code == 1 and len(lines) == 21
    assert sum(line.startswith("outside") for line in lines) > 3
    assert lines[5].startswith("outside  ") and lines[5].endswith("  model.layers.1/Add (layer 1), float32 [1, 5, 64]")
    assert first == "first tensor outside its band: model.layers.1/Add (layer 1), float32 [1, 5, 64]"
    assert error.startswith("  error ") and error.endswith(", band 2.0e-02")
    assert worst.startswith("  worst at [0, ") and worst.endswith(" on ONNX Runtime")


def test_tensors_narrow_a_package_down(stories, debug):
    code, said, _ = debug(stories.path, *PROMPT, "--tensors", "model.layers.1.mlp*", "--json", damage=weight(UP, nan))
    found = json.loads(said)
    assert code == 1 and found["first"]["name"] == "model.layers.1.mlp.up_proj/MatMul"
    assert found["first"]["error"] is None and found["first"]["not_finite"] == 5 and found["first"]["outside"]
    assert {each["layer"] for each in found["tensors"]} == {1, None} and "NaN" not in said


@pytest.fixture(scope="module")
def engine(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "engine"
    return build(stories.path, folder, max_seq=32, chunk=8, debug_tensors=("model.layers.*/Add*",)).engine


def test_an_engine_is_compared_with_its_package(engine, debug):
    code, said, _ = debug(engine.path, *PROMPT)
    assert code == 0 and said.startswith("all 11 tensors within their bands")
    code, said, _ = debug(engine.path, *PROMPT, "--tensors", "*/Add", damage=weight(UP, double))
    assert code == 1 and "model.layers.2/Add (layer 2)" in said.splitlines()[0]
    assert debug(engine.path, *PROMPT, "--band", "9", damage=weight(UP, double))[0] == 0


def test_what_cannot_be_compared_is_one_sentence(stories, engine, debug, tmp_path):
    plain = build(stories.path, tmp_path / "plain", max_seq=32, chunk=8).engine.path
    alone = tmp_path / "elsewhere" / "engine"
    shutil.copytree(engine.path, alone)
    for said, *arguments in (
        ("was built without --debug-tensors", plain, *PROMPT),
        ("the package that", alone, *PROMPT),
        ("none of the engine's 10 debug tensors is named so", engine.path, *PROMPT, "--tensors", "*/Mul"),
        (
            "no tensor that the graph computes is named like '*/Nothing'",
            stories.path,
            *PROMPT,
            "--tensors",
            "*/Nothing",
        ),
        ("one step of the engine takes 8", engine.path, "-p", "Once upon a time " * 9),
        ("is for up to 512: shorten it", stories.path, "-p", "Once upon a time " * 200),
        ("the prompt is empty", engine.path, "-p", ""),
        ("--flavor is for a package", engine.path, *PROMPT, "--flavor", "rtx"),
        ("--band should be a number from 0 on, but is nan", engine.path, *PROMPT, "--band", "nan"),
        ("llmtrt quantize", tmp_path, *PROMPT),
    ):
        code, out, error = debug(*arguments)
        assert (code, out, error.count("\n")) == (2, "", 1), error
        assert error.startswith("llmtrt debug: error: ") and said in error, error


def test_without_a_gpu_nothing_is_built(stories, debug, monkeypatch):
    monkeypatch.setattr("llmtrt.engine.build.build", None)
    code, out, error = debug(stories.path, *PROMPT, problem="no NVIDIA driver is installed (libcuda is missing)")
    assert (code, out) == (2, "")
    assert error == (
        "llmtrt debug: error: debug runs an engine and needs an NVIDIA GPU, but no NVIDIA driver is installed (libcuda is "
        "missing)\n"
    )
