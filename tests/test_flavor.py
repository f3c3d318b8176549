"""TensorRT flavors are told by what their module has, and a broken one in a sentence."""

import subprocess
import sys
import types

import pytest

from llmtrt.engine.flavor import NAMES, Flavor, Missing, choose, describe, find_flavors
from llmtrt.errors import UserError


@pytest.fixture
def broken_tensorrt(tmp_path, monkeypatch):
    """A module ``tensorrt`` that fails to load as one does whose libraries are absent."""
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open\\n shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


def test_rtx_is_found_with_what_its_module_can():
    pytest.importorskip("tensorrt_rtx_bindings")
    flavor = choose("rtx")
    assert flavor.name == "rtx" and flavor.version == flavor.module.__version__
    assert {
        "build",
        "run",
        "builds_without_gpu",
        "strip",
        "refit",
        "weight_streaming",
        "user_memory",
        "runtime_cache",
        "kernel_specialization",
        "kv_cache_update",
    } <= flavor.capabilities
    assert not flavor.can("plugins")
    assert {"7.5", "8.9", "12.0"} <= set(flavor.targets)


def test_capabilities_come_from_the_module_and_not_from_its_name():
    runtime_only = types.SimpleNamespace(__version__="11.4.0", Runtime=object, ICudaEngine=object)
    flavor = describe("rtx", runtime_only)
    assert flavor.capabilities == {"run"} and flavor.targets == () and flavor.version == "11.4.0"


def test_a_flavor_that_does_not_load_is_told_in_one_line(broken_tensorrt):
    (found,) = [flavor for flavor in find_flavors() if flavor.name == "tensorrt"]
    assert isinstance(found, Missing)
    assert found.reason == "tensorrt does not load: libnvinfer.so.11: cannot open shared object file"
    with pytest.raises(UserError, match="libnvinfer.so.11.*`pip install tensorrt`"):
        choose("tensorrt")


def test_no_flavor_names_the_command_that_installs_one(broken_tensorrt, monkeypatch):
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError,
        match="rtx: .*; tensorrt: .*libnvinfer.*`pip install tensorrt-rtx-cu12-bindings tensorrt-rtx-cu12-libs`",
    ):
        choose()


def test_an_unknown_flavor_is_refused():
    with pytest.raises(UserError, match="'trt'.*auto, rtx or tensorrt"):
        choose("trt")


def test_every_flavor_is_listed_once():
    found = find_flavors()
    assert tuple(flavor.name for flavor in found) == NAMES
    assert all(isinstance(flavor, Flavor | Missing) for flavor in found)


def test_the_engine_modules_import_neither_tensorrt_nor_heavy_libraries():
    code = (
        "import sys, llmtrt.engine.build, llmtrt.engine.manifest, llmtrt.engine.doctor, llmtrt.runtime.tensorrt\n"
        "print([name for name in sys.modules if name.split('.')[0] in "
        "('tensorrt', 'tensorrt_rtx', 'tensorrt_rtx_bindings', 'torch', 'onnx', 'onnx_ir', 'onnxruntime', "
        "'transformers') or name.startswith('cuda.bindings')])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
