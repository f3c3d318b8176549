"""What the doctor says of a machine, and of a broken one."""

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from llmtrt.cli import doctor as verb
from llmtrt.engine import doctor
from llmtrt.engine.flavor import NAMES, Missing, describe
from llmtrt.engine.gpu import Gpu, Gpus, find_gpus
from llmtrt.engine.installed import Installed


def _component(facts, name):
    return next(component for component in facts.components if component.name == name)


def test_facts_of_this_machine_are_the_libraries_own():
    import onnxruntime

    facts = doctor.examine()
    assert _component(facts, "onnxruntime").version == onnxruntime.__version__
    assert facts.gpu_problem == find_gpus().problem and bool(facts.gpus) != bool(facts.gpu_problem)
    assert json.loads(json.dumps(facts.to_json()))["components"][0]["name"] == "onnxruntime"
    for component in facts.components:
        assert bool(component.version) != bool(component.problem), component
        assert bool(component.problem) == bool(component.command), component
    assert "torch" not in facts.to_json()


def test_a_broken_library_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise OSError('GLIBC_2.99 not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    facts = doctor.examine()
    assert _component(facts, "onnxruntime").problem == "does not load: GLIBC_2.99 not found"
    assert facts.verdict[0] == (
        "packages do not run: onnxruntime (does not load: GLIBC_2.99 not found): `pip install 'onnxruntime>=1.24'`"
    )


def _verdict(facts, about):
    (line,) = [line for line in facts.verdict if line.startswith(about)]
    return line


def test_verdicts_rest_on_what_quantize_and_build_import(monkeypatch):
    pytest.importorskip("tensorrt_rtx_bindings")
    facts = doctor.examine()
    assert _verdict(facts, "packages can") == "packages can be made"
    assert _verdict(facts, "engines can be built").startswith("engines can be built with TensorRT rtx")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert _verdict(doctor.examine(), "packages can").startswith("packages can be made, but not of GGUF files: gguf (")
    for name in [name for name in sys.modules if name.split(".")[0] == "onnx_ir"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    facts = doctor.examine()
    lacking = "onnx (not installed), onnx_ir (does not load: it needs onnx): `pip install 'onnx>=1.20' 'onnx_ir>=1.0'`"
    assert _verdict(facts, "packages can") == f"packages cannot be made: {lacking}"
    assert _verdict(facts, "engines cannot be built") == f"engines cannot be built: {lacking}"
    assert _component(facts, "onnx").command == "pip install 'onnx>=1.20'"


def test_a_library_that_is_too_old_is_a_finding(monkeypatch):
    monkeypatch.setattr(sys.modules["onnx"] if "onnx" in sys.modules else __import__("onnx"), "__version__", "1.19.1")
    facts = doctor.examine()
    assert _component(facts, "onnx").problem == "too old: 1.19.1 instead of onnx>=1.20"
    assert _verdict(facts, "packages can").startswith("packages cannot be made: onnx (too old")


def test_the_minimums_are_those_that_llmtrt_is_installed_with():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = {line for extra in ("cpu", "quantize") for line in project["optional-dependencies"][extra]}
    assert {library.requirement for library in doctor.LIBRARIES} == {re.sub(r"\s", "", line) for line in wanted}


@pytest.mark.parametrize(
    "capability, says", [("12.0", "yes"), ("8.0", "yes"), ("9.0", "not promised: it supports 7.5")]
)
def test_which_gpu_a_flavor_fits(monkeypatch, capability, says):
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    monkeypatch.setattr(doctor, "find_gpus", lambda: Gpus((Gpu(0, "Some GPU", capability, 24 << 30),), "580.1", "13.0"))
    monkeypatch.setattr(doctor, "find_flavors", lambda: [describe("rtx", trt)])
    facts = doctor.examine()
    assert facts.gpus[0].flavors["rtx"].startswith(says)
    assert (facts.driver, facts.cuda, facts.gpu_problem) == ("580.1", "13.0", "")


def test_no_tensorrt_names_the_command(monkeypatch):
    for name in ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    assert (
        "engines cannot be built: `pip install tensorrt-rtx-cu12-bindings tensorrt-rtx-cu12-libs`"
        in doctor.examine().verdict
    )


def test_versions_beside_the_imported_one_are_shown_with_their_folder(monkeypatch, capsys):
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    flavors = [
        describe("rtx", trt),
        Installed("rtx", "tensorrt_rtx", "1.9.0.1", "/opt/rtx19"),
        Missing("lean", "the Python module tensorrt_lean is not installed", "pip install tensorrt-lean"),
    ]
    monkeypatch.setattr(doctor, "find_flavors", lambda: flavors)
    found = [part for part in doctor.examine().components if part.name.startswith("TensorRT")]
    assert [(part.name, part.version) for part in found] == [
        ("TensorRT rtx", trt.__version__),
        ("TensorRT rtx", "1.9.0.1"),
        ("TensorRT lean", ""),
    ]
    assert "builds engines from ONNX" in found[0].abilities
    assert f"lies in {Path(trt.__file__).parents[1]}" in found[0].abilities
    assert found[1].abilities == ("lies in /opt/rtx19, not imported",)
    assert found[2].purpose == "runs version-compatible engines of TensorRT tensorrt"
    verb.run(argparse.Namespace(json=False))
    assert (
        "TensorRT rtx 1.9.0.1: ok, builds and runs engines\n    lies in /opt/rtx19, not imported\n"
        in capsys.readouterr().out
    )


def test_every_flavor_is_a_component():
    names = {component.name for component in doctor.examine().components}
    assert {f"TensorRT {name}" for name in NAMES} <= names
