"""TensorRT flavors are told by what their module has, their versions by metadata, and a broken one in a sentence."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from llmtrt.engine.flavor import NAMES, Flavor, Missing, choose, choose_for, describe, find_flavors
from llmtrt.engine.installed import UNKNOWN, VARIABLE, Installed, find_installed
from llmtrt.engine.logger import make_logger
from llmtrt.errors import UserError


@pytest.fixture
def broken_tensorrt(tmp_path, monkeypatch):
    """A module ``tensorrt`` that fails to load as one does whose libraries are absent."""
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open\\n shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


class Machine:
    """Fake modules in folders: ``env`` is on sys.path, LLMTRT_TENSORRT lists the others in the order of their making."""

    def __init__(self, root, monkeypatch):
        self.root, self.monkeypatch, self.listed = root, monkeypatch, []
        monkeypatch.delenv(VARIABLE, raising=False)
        rest = [place for place in sys.path if not any(Path(place).glob("tensorrt*"))]
        monkeypatch.setattr(sys, "path", [self.folder("env"), *rest])

    def folder(self, name):
        (self.root / name).mkdir(exist_ok=True)
        return str(self.root / name)

    def install(self, place, module, version, source="", metadata=True, libraries=None):
        folder = Path(self.folder(place))
        if place != "env" and folder not in self.listed:
            self.listed.append(folder)
            self.monkeypatch.setenv(VARIABLE, os.pathsep.join(map(str, self.listed)))
        package = folder / module
        package.mkdir()
        builder = "class Builder: ...\nclass OnnxParser: ...\n" if module in ("tensorrt", "tensorrt_rtx") else ""
        runtime = "class Runtime: ...\nclass ICudaEngine: ...\n"
        (package / "__init__.py").write_text(source or f"__version__ = {version!r}\n{runtime}{builder}")
        if metadata:
            (folder / f"{module}_cu12_bindings-{version}.dist-info").mkdir()
        if libraries:
            (folder / f"{module}_libs").mkdir()
            (folder / f"{module}_libs" / "__init__.py").touch()
            (folder / f"{module}_cu12_libs-{libraries}.dist-info").mkdir()
        return str(folder)


def _imported():
    return {name for name in sys.modules if name.startswith("tensorrt")}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One where no TensorRT is installed or imported but what the test installs."""
    real = {name: sys.modules.pop(name) for name in _imported()}
    yield Machine(tmp_path, monkeypatch)
    for name in _imported():
        del sys.modules[name]
    sys.modules.update(real)


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
    assert not flavor.can("plugins") and not flavor.can("version_compatible")
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
    with pytest.raises(UserError, match="'trt': choose auto, rtx, tensorrt, lean or dispatch, or one version"):
        choose("trt")


@pytest.mark.parametrize(
    "text", ["", "==1.7", "rtx=1.7", "rtx==", "rtx==x", "rtx==1.7.", "rtx>=1.7", "auto==1.7", "rtx==1.7\n", "trt==1.7"]
)
def test_what_is_no_flavor_with_a_version_is_refused(machine, text):
    machine.install("env", "tensorrt_rtx", "1.7.1.116")
    with pytest.raises(UserError, match=rf"no TensorRT flavor {re.escape(repr(text))}: .* as in rtx==1\.7$"):
        choose(text)


def test_every_flavor_is_listed_once(machine):
    machine.install("env", "tensorrt_lean", "11.4.0.106")
    found = find_flavors()
    assert tuple(flavor.name for flavor in found) == NAMES == ("rtx", "tensorrt", "lean", "dispatch")
    assert [type(flavor) for flavor in found] == [Missing, Missing, Flavor, Missing]
    assert found[3].reason == "the Python module tensorrt_dispatch is not installed"
    assert found[3].command == "pip install tensorrt-dispatch"


def test_a_flavor_that_only_runs_is_chosen_to_run_and_refused_to_build(machine):
    machine.install("env", "tensorrt_lean", "11.4.0.106")
    assert choose(need="run").name == choose("lean", need="run").name == "lean"
    with pytest.raises(UserError, match=r"^TensorRT flavor lean 11\.4\.0\.106 is none that builds engines from ONNX"):
        choose("lean")
    with pytest.raises(
        UserError, match=r"builds engines from ONNX \(.*lean: 11\.4\.0\.106 does not; dispatch: .*not inst"
    ):
        choose()


def test_the_bindings_alone_are_a_flavor(machine):
    """As the wheel unpacks them, under a name of their own."""
    folder = machine.install("env", "tensorrt_lean_bindings", "11.4.0.106", metadata=False)
    (Path(folder) / "tensorrt_lean_cu13_bindings-11.4.0.106.dist-info").mkdir()
    assert find_installed("lean") == [Installed("lean", "tensorrt_lean_bindings", "11.4.0.106", folder)]
    assert choose("lean", need="run").module.__name__ == "tensorrt_lean_bindings"


BOOM = "raise AssertionError('imported, though another version was chosen')"


def test_versions_are_told_apart_without_importing_them(machine):
    places = {
        version: machine.install(place, "tensorrt_rtx", version, BOOM)
        for place, version in (("one", "1.7.1.116"), ("two", "1.6.1.120"), ("env", "1.5.0.114"))
    }
    machine.install("two", "tensorrt", "11.4.0.106", BOOM)
    Path(machine.folder("one"), "tensorrt_lean_cu13_bindings-11.4.0.106.dist-info").mkdir()  # of a module that is gone
    found = [(one.version, one.folder) for one in find_installed("rtx")]
    assert found == list(places.items())
    assert [one.version for one in find_installed("tensorrt")] == ["11.4.0.106"]
    assert find_installed("lean") == []
    assert not _imported()


@pytest.mark.parametrize(
    "asked, version",
    [
        ("rtx", "1.70.0.1"),
        ("auto", "1.70.0.1"),
        ("rtx==1.7", "1.7.1.116"),
        ("rtx==1.7.1", "1.7.1.116"),
        ("rtx==1.6.1.120", "1.6.1.120"),
        ("rtx==1", "1.70.0.1"),
    ],
)
def test_a_version_is_chosen_by_its_beginning(machine, asked, version):
    for place, other in (("one", "1.70.0.1"), ("two", "1.7.1.116"), ("env", "1.6.1.120")):
        machine.install(place, "tensorrt_rtx", other, "" if other == version else BOOM)
    before = list(sys.path)
    flavor = choose(asked)
    assert flavor.version == flavor.module.__version__ == version
    assert sys.path == before
    assert choose(asked).module is flavor.module


def test_a_version_that_is_not_here_is_named_with_the_command(machine):
    machine.install("one", "tensorrt_rtx", "1.70.0.1", BOOM)
    machine.install("env", "tensorrt_rtx", "1.6.1.120", BOOM)
    with pytest.raises(UserError) as error:
        choose("rtx==1.7")
    assert str(error.value) == (
        "TensorRT flavor rtx==1.7: 1.70.0.1, 1.6.1.120 are installed: install it with `pip install "
        "'tensorrt-rtx-cu12-bindings==1.7.*' 'tensorrt-rtx-cu12-libs==1.7.*'` (with --target FOLDER, and FOLDER in "
        "LLMTRT_TENSORRT, to keep what is here)"
    )
    with pytest.raises(
        UserError, match="module tensorrt is not installed: install it with `pip install 'tensorrt==11.*'`$"
    ):
        choose("tensorrt==11")


def test_a_process_holds_one_version(machine):
    machine.install("one", "tensorrt_rtx", "1.7.1.116", BOOM)
    machine.install("env", "tensorrt_rtx", "1.6.1.120")
    held = choose("rtx==1.6").module
    refusal = (
        "TensorRT rtx 1.7.1.116 cannot be used in this process, which has imported 1.6.1.120 and can hold one version"
    )
    with pytest.raises(UserError, match=refusal):
        choose("rtx==1.7")
    with pytest.raises(UserError, match=refusal):
        choose_for("rtx", "1.7.1.116", False)
    with pytest.raises(UserError, match="^TensorRT flavor rtx==1.5: 1.6.1.120, 1.7.1.116 are installed: .*==1.5"):
        choose("rtx==1.5")
    assert choose("rtx").module is choose().module is held
    first, other, *_ = find_flavors()
    assert first.module is held and (other.version, other.folder) == ("1.7.1.116", machine.folder("one"))


def test_a_version_without_metadata_is_known_once_it_is_imported(machine):
    folder = machine.install("env", "tensorrt", "11.9.0.1", metadata=False)
    machine.install("env", "tensorrt_rtx", "1.7.1.116")
    assert find_installed("tensorrt") == [Installed("tensorrt", "tensorrt", UNKNOWN, folder)]
    with pytest.raises(UserError, match=r"tensorrt==11\.4: 11\.9\.0\.1 is installed"):
        choose("tensorrt==11.4")
    assert choose("tensorrt==11.9").version == "11.9.0.1"


@pytest.mark.parametrize("already", [False, True])
def test_bindings_are_not_mixed_with_the_libraries_of_another_version(machine, already):
    """All versions' libraries bear the same file names, so Python would find and load those of the environment."""
    machine.install("one", "tensorrt_rtx", "1.7.1.116", BOOM, libraries="1.7.1.116" if already else None)
    env = machine.install("env", "tensorrt_rtx", "1.6.1.120", libraries="1.6.1.120")
    if already:
        __import__("tensorrt_rtx_libs")
    with pytest.raises(UserError, match=f"1.7.1.116 in .*one would load the libraries of 1.6.1.120 in {env}: install"):
        choose("rtx==1.7")
    assert choose("rtx==1.6").version == "1.6.1.120"


def test_libraries_beside_the_bindings_are_the_ones_that_load(machine):
    source = "import tensorrt_rtx_libs as libs\n__version__ = '1.7.1.116'\nclass Runtime: ...\nclass ICudaEngine: ..."
    machine.install("one", "tensorrt_rtx", "1.7.1.116", source, libraries="1.7.1.116")
    machine.install("env", "tensorrt_rtx", "1.6.1.120", BOOM, libraries="1.6.1.120")
    libraries = choose("rtx==1.7", need="run").module.libs
    assert Path(libraries.__file__).parents[1] == Path(machine.folder("one"))


def test_what_is_listed_and_is_no_folder_is_named(machine, monkeypatch):
    monkeypatch.setenv(VARIABLE, os.pathsep.join([machine.folder("one"), "/no/such/folder"]))
    with pytest.raises(UserError, match="LLMTRT_TENSORRT lists /no/such/folder, which should be a folder made by `pip"):
        choose()


def test_a_namesake_is_not_tensorrt(machine):
    machine.install("env", "tensorrt", "0.1", "nothing = True")
    with pytest.raises(UserError, match="tensorrt in .*env is not TensorRT's"):
        choose("tensorrt", need="run")
    Path(machine.folder("env"), "tensorrt_rtx").mkdir()  # a folder is no package
    assert find_installed("rtx") == []


@pytest.mark.parametrize(
    "name, here, built_by, built, compatible, does",
    [
        ("rtx", "1.6.1.120", "rtx", "1.6.1.120", False, True),
        ("rtx", "1.7.1.116", "rtx", "1.6.1.120", False, False),
        ("rtx", "1.7.1.116", "rtx", "1.6.1.120", True, False),  # no family, whatever a manifest says
        ("tensorrt", "1.6.1.120", "rtx", "1.6.1.120", True, False),
        ("tensorrt", "11.4.0.106", "tensorrt", "11.4.0.106", False, True),
        ("tensorrt", "11.4.0.106", "tensorrt", "11.4.0.106", True, True),
        ("tensorrt", "11.4.1.2", "tensorrt", "11.4.0.106", False, False),
        ("tensorrt", "11.4.1.2", "tensorrt", "11.4.0.106", True, True),
        ("tensorrt", "11.10.0.1", "tensorrt", "11.4.0.106", True, True),
        ("tensorrt", "11.3.0.99", "tensorrt", "11.4.0.106", True, False),
        ("tensorrt", "12.5.0.1", "tensorrt", "11.4.0.106", True, False),
        ("lean", "11.4.0.106", "tensorrt", "11.4.0.106", False, False),
        ("lean", "11.4.0.106", "tensorrt", "11.4.0.106", True, True),
        ("dispatch", "11.5.0.1", "tensorrt", "11.4.0.106", True, True),
        ("dispatch", "10.16.1.11", "tensorrt", "11.4.0.106", True, False),
        ("lean", "11.4.0.106", "vino", "11.4.0.106", True, False),
    ],
)
def test_which_engines_a_flavor_runs(name, here, built_by, built, compatible, does):
    flavor = describe(name, types.SimpleNamespace(__version__=here))
    reason = flavor.runs(built_by, built, compatible)
    assert (reason == "") == does
    installed = here if name == built_by else f"{name} {here}"
    assert does or reason == (
        f"was built with TensorRT {built_by} {built} and {installed} is installed: install that version or build the "
        "engine anew"
    )


@pytest.mark.parametrize(
    "built_by, version, compatible, chosen",
    [
        ("tensorrt", "10.16.1.11", False, ("tensorrt", "10.16.1.11")),
        ("tensorrt", "10.9.0.34", True, ("tensorrt", "10.16.1.11")),
        ("tensorrt", "11.3.0.99", True, ("lean", "11.3.0.99")),
        ("tensorrt", "11.4.0.106", True, ("dispatch", "11.4.0.106")),
        ("rtx", "1.6.1.120", False, ("rtx", "1.6.1.120")),
    ],
)
def test_the_first_that_runs_an_engine_is_imported(machine, built_by, version, compatible, chosen):
    for place, module, other in (
        ("one", "tensorrt_rtx", "1.7.1.116"),
        ("two", "tensorrt_rtx", "1.6.1.120"),
        ("env", "tensorrt", "10.16.1.11"),
        ("env", "tensorrt_lean", "11.3.0.99"),
        ("two", "tensorrt_dispatch", "11.4.0.106"),
    ):
        name = "tensorrt" if module == "tensorrt" else module.split("_")[1]
        machine.install(place, module, other, "" if (name, other) == chosen else BOOM)
    flavor = choose_for(built_by, version, compatible)
    assert (flavor.name, flavor.version) == chosen and flavor.runs(built_by, version, compatible) == ""


def test_a_flavor_that_does_not_load_leaves_its_engines_to_the_next(machine):
    machine.install("env", "tensorrt", "11.4.0.106", "raise ImportError('libnvinfer.so.11 is missing')")
    machine.install("one", "tensorrt_lean", "11.4.0.106")
    assert choose_for("tensorrt", "11.4.0.106", True).name == "lean"
    with pytest.raises(
        UserError, match=r"11\.4\.0\.106 and tensorrt does not load: libnvinfer.so.11 is missing: install"
    ):
        choose_for("tensorrt", "11.4.0.106", False)


def test_an_engine_that_nothing_here_runs_is_named_with_the_command(machine):
    with pytest.raises(UserError) as error:
        choose_for("rtx", "1.6.1.120", False, "llama.engine")
    assert str(error.value) == (
        "llama.engine was built with TensorRT rtx 1.6.1.120 and the Python module tensorrt_rtx is not installed: install "
        "it with `pip install tensorrt-rtx-cu12-bindings==1.6.1.120 tensorrt-rtx-cu12-libs==1.6.1.120`, or build the "
        "engine anew"
    )
    machine.install("env", "tensorrt", "10.16.1.11", BOOM)
    machine.install("env", "tensorrt_lean", "11.3.0.99", BOOM)
    with pytest.raises(UserError) as error:
        choose_for("tensorrt", "11.4.0.106", True)
    assert str(error.value) == (
        "the engine was built with TensorRT tensorrt 11.4.0.106 and 10.16.1.11 is installed; lean: 11.3.0.99 is "
        "installed; dispatch: the Python module tensorrt_dispatch is not installed: install it with `pip install "
        "tensorrt==11.4.0.106` (with --target FOLDER, and FOLDER in LLMTRT_TENSORRT, to keep what is here), or build the "
        "engine anew"
    )
    with pytest.raises(
        UserError, match="^the engine was built with TensorRT vino 1, a flavor that llmtrt does not know"
    ):
        choose_for("vino", "1", True)


def test_every_version_is_found_and_one_of_each_flavor_described(machine):
    machine.install("one", "tensorrt_rtx", "1.7.1.116")
    env = machine.install("env", "tensorrt_rtx", "1.6.1.120", BOOM)
    machine.install("env", "tensorrt", "11.4.0.106", "raise OSError('no libnvinfer')")
    two = machine.install("two", "tensorrt", "10.16.1.11", BOOM)
    Path(two, "tensorrt", "__init__.py").write_text("raise OSError('no libnvinfer')")
    found = find_flavors()
    assert [(one.name, type(one)) for one in found] == [
        ("rtx", Flavor),
        ("rtx", Installed),
        ("tensorrt", Missing),
        ("tensorrt", Installed),
        ("lean", Missing),
        ("dispatch", Missing),
    ]
    assert found[0].version == "1.7.1.116" and found[0].can("build")
    assert found[1] == Installed("rtx", "tensorrt_rtx", "1.6.1.120", env)
    assert found[3] == Installed("tensorrt", "tensorrt", "11.4.0.106", env)


def test_rtx_has_the_flag_of_version_compatible_engines_and_builds_none():
    """Why the flag alone does not make the capability: the lean runtime that goes into such a plan is not shipped."""
    pytest.importorskip("tensorrt_rtx_bindings")
    flavor = choose("rtx", "builds_without_gpu")
    trt, logger = flavor.module, make_logger(flavor)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    network.mark_output(network.add_identity(network.add_input("x", trt.float16, (1, 16))).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None
    config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    logger.clear()
    assert builder.build_serialized_network(network, config) is None
    assert "libnvinfer_lean" in logger.reason()
    assert not flavor.can("version_compatible")


def test_the_engine_modules_import_neither_tensorrt_nor_heavy_libraries():
    code = (
        "import sys, llmtrt.engine.build, llmtrt.engine.manifest, llmtrt.engine.doctor, llmtrt.runtime.tensorrt\n"
        "print([name for name in sys.modules if name.split('.')[0] in "
        "('torch', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers') or name.startswith(('tensorrt', 'cuda.bindings'))])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
