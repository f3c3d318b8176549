"""What the doctor says of a machine, and of a broken one."""

import json
import sys

import pytest

from llmtrt.engine import doctor
from llmtrt.engine.flavor import describe
from llmtrt.engine.gpu import Gpu, Gpus, find_gpus


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
    assert facts.verdict[0].startswith("packages do not run") and "pip install 'onnxruntime>=1.24'" in facts.verdict[0]


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
