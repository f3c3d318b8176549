"""`llmtrt debug` on a real GPU: sound engines are inside their bands, and one of other weights is found out."""

import json
import shutil
from contextlib import closing

import pytest
import samples
from safetensors.numpy import load_file, save_file
from test_gpu import TEXT, gpu, tokens  # noqa: F401 - gpu skips where there is none

from llmtrt.cli.main import main
from llmtrt.engine.build import build
from llmtrt.evaluate.debug import PATTERNS, compare
from llmtrt.quantization.pipeline import quantize
from llmtrt.runtime.tensorrt import TrtSession

pytestmark = pytest.mark.gpu

PACKAGES = {
    "stories-fp32": (samples.stories260k, "fp32"),
    "stories-int4": (samples.stories260k, "int4-g32"),
    "smollm2-int4": (samples.smollm2_gguf, "int4-g64"),
}


def compared(built_from, package, folder, patterns=PATTERNS):
    """``package`` against an engine of ``built_from``, over the first 40 tokens of TEXT."""
    engine = build(built_from.path, folder, max_seq=128, chunk=64, debug_tensors=patterns).engine
    with closing(TrtSession(engine)) as session:
        found = compare(package, session, tokens(package, 40))
    print(f"{package.path}: worst {found.worst}; left out: {found.left_out}")
    return found


@pytest.mark.parametrize("name", PACKAGES)
def test_a_sound_engine_is_inside_its_bands(name, tmp_path):
    checkpoint, recipe = PACKAGES[name]
    package = quantize(checkpoint(), tmp_path / "package", recipe).package
    found = compared(package, package, tmp_path / "engine")
    assert found.first is None, found.first
    assert len(found.differences) == 4 * package.spec.layers + 1 and not found.left_out


def test_every_tensor_of_a_layer_can_be_an_output(tmp_path):
    package = quantize(samples.stories260k(), tmp_path / "package", "int4-g32").package
    found = compared(package, package, tmp_path / "engine", ("model.layers.1.*",))
    assert found.first is None, found.first
    assert {each.layer for each in found.differences} == {1, None} and len(found.differences) > 20
    assert all("/Slice" in name for name in found.left_out)  # of the cache: each runtime rounds its rows up differently


def test_other_weights_are_found_in_their_layer(tmp_path):
    """The engine of one checkpoint against the package of another, which differs in one matrix of layer 2."""
    other = shutil.copytree(samples.stories260k(), tmp_path / "checkpoint")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= 2
    save_file(weights, other / "model.safetensors")
    built_from, package = (
        quantize(checkpoint, tmp_path / name, "int4-g32").package
        for name, checkpoint in (("a", samples.stories260k()), ("b", other))
    )
    first = compared(built_from, package, tmp_path / "engine").first
    assert (first.name, first.layer) == ("model.layers.2/Add_2", 2)


def test_the_command_builds_runs_and_clears_away(tmp_path, capsys, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    package = quantize(samples.stories260k(), tmp_path / "package", "int4-g32").package
    assert main(["debug", str(package.path), "-p", TEXT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first"] is None and len(found["tensors"]) == 4 * package.spec.layers + 1
    assert list((tmp_path / "temporary").iterdir()) == []
