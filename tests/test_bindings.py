"""Every name of TensorRT's Python API that llmtrt uses exists in the real bindings, those that cannot run here too.

tests/bindings/*.json was made by tools/list_bindings.py from the wheels that they are named after.
"""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmtrt.engine.flavor import CAPABILITIES, Flavor, choose, describe
from llmtrt.engine.load import WHY
from llmtrt.engine.manifest import Engine
from llmtrt.engine.options import FLAGS
from llmtrt.runtime.context import ALLOCATIONS

SOURCE = Path(__file__).parents[1] / "llmtrt"
LISTINGS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "bindings").glob("*.json")}

# What a variable is in every file that uses a flavor, and what else in a folder or a file. Attributes of our own Engine
# are not TensorRT's, though it shares a variable's name.
VARIABLES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "deserialized": "ICudaEngine",
    "engine": "ICudaEngine",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "refitter": "Refitter",
    "runtime": "Runtime",
    "self._context": "IExecutionContext",
    "self._engine": "ICudaEngine",
    "self._runtime": "Runtime",
}
EXCEPT = {
    "engine/parse.py": {"error": "ParserError"},
    "engine/refit.py": {"config": "ISerializationConfig", "parser": "OnnxParserRefitter"},
    "engine/profiles.py": {"added": "IOptimizationProfile"},
    "runtime": {"config": "IRuntimeConfig"},
    "runtime/kernel_cache.py": {"self._cache": "IRuntimeCache"},
    "runtime/tensors.py": {"engine": "ICudaEngine"},
    "runtime/kv_cache.py": {"engine": "ICudaEngine"},
    "runtime/tensorrt.py": {"context": None, "decoder": "ICudaEngine"},  # its contexts are our Context
}
MODULES = ("trt", "flavor.module", "self._flavor.module")
OURS = {name for name in dir(Engine)} | set(Engine.__dataclass_fields__)

# Used only where the flavor says that it can: (class, member or None for all of it) → capability.
GUARDED = {
    ("IBuilderConfig", "set_compute_capability"): "builds_without_gpu",
    ("IBuilderConfig", "num_compute_capabilities"): "builds_without_gpu",
    ("ComputeCapability", None): "builds_without_gpu",
    ("IRuntimeConfig", None): "runtime_config",
    ("ICudaEngine", "create_runtime_config"): "runtime_config",
    ("IRuntimeConfig", "cuda_graph_strategy"): "cuda_graphs",
    ("CudaGraphStrategy", None): "cuda_graphs",
    ("IRuntimeCache", None): "runtime_cache",
    ("IRuntimeConfig", "create_runtime_cache"): "runtime_cache",
    ("IRuntimeConfig", "get_runtime_cache"): "runtime_cache",
    ("IRuntimeConfig", "set_runtime_cache"): "runtime_cache",
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"): "kernel_specialization",
    ("DynamicShapesKernelSpecializationStrategy", None): "kernel_specialization",
    ("EngineInvalidityDiagnostics", None): "engine_validity",
    ("Runtime", "get_engine_validity"): "engine_validity",
    ("Runtime", "engine_host_code_allowed"): "host_code",
    ("BuilderFlag", "VERSION_COMPATIBLE"): "version_compatible",
    ("BuilderFlag", "EXCLUDE_LEAN_RUNTIME"): "version_compatible",
    ("OnnxParser", None): "build",
    ("ParserError", None): "build",
    ("OnnxParserRefitter", None): "refit",
    ("Refitter", None): "refit",
}


def touched(file: Path, text: str | None = None) -> set[tuple[str, str | None]]:
    """(class, member) of all that a source file takes from TensorRT; (class, None) where it takes the class."""
    found, text = set(), text or file.read_text()
    uses = re.search(r"^from llmtrt\.engine\.flavor import .*\b(Flavor|choose\w*)\b", text, re.MULTILINE)
    place = file.relative_to(SOURCE)
    variables = (VARIABLES | EXCEPT.get(place.parts[0], {}) if uses else {}) | EXCEPT.get(place.as_posix(), {})
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("_"):
            continue
        base = ast.unparse(node.value)
        if variables.get(base) and not (base == "engine" and node.attr in OURS):
            found.add((variables[base], node.attr))
        elif base in MODULES and node.attr[0].isupper():
            found.add((node.attr, None))
        elif base.startswith("trt.") and base.count(".") == 1:
            found.add((base.removeprefix("trt."), node.attr))
    return found


def flavor_of(listing: dict) -> Flavor:
    """The flavor that a listing describes, as flavor.py would see it."""
    classes = {
        name: SimpleNamespace(**dict.fromkeys(members), __members__=dict.fromkeys(members))
        for name, members in listing["classes"].items()
    }
    return describe(listing["wheel"], SimpleNamespace(**classes))


def missing(names: set[tuple[str, str | None]], listing: dict) -> list[str]:
    flavor, classes = flavor_of(listing), listing["classes"]
    wanted = {
        (kind, member)
        for kind, member in names
        if all(flavor.can(capability) for key in ((kind, member), (kind, None)) if (capability := GUARDED.get(key)))
    }
    return sorted(
        f"{kind}.{member}" if member else kind
        for kind, member in wanted
        if kind not in classes or (member and member not in classes[kind])
    )


def reached(file: Path, found: frozenset[Path] = frozenset()) -> frozenset[Path]:
    """The file and what it imports, at any place, from our engine and runtime."""
    for folder, name in re.findall(r"from llmtrt\.(engine|runtime)\.(\w+) import", file.read_text()):
        if (other := SOURCE / folder / f"{name}.py") not in found:
            found = reached(other, found | {other})
    return found | {file}


EVERY = sorted([*(SOURCE / "engine").glob("*.py"), *(SOURCE / "runtime").glob("*.py")])
RUNNING = sorted(reached(SOURCE / "runtime" / "tensorrt.py"))  # what a flavor without a builder has to do with
BUILDERS = [name for name, listing in LISTINGS.items() if flavor_of(listing).can("build")]


def product(name: str) -> tuple[str, str]:
    """("tensorrt_rtx", "1.6") of a listing's name."""
    wheel, version = name.split("-")
    return wheel.split("_cu")[0], ".".join(version.split(".")[:2])


def test_the_listings_are_of_the_versions_that_llmtrt_speaks_of():
    assert {product(name) for name in LISTINGS} == {
        ("tensorrt", "10.16"),
        ("tensorrt", "11.4"),
        ("tensorrt_lean", "11.4"),
        ("tensorrt_dispatch", "11.4"),
        ("tensorrt_rtx", "1.6"),
        ("tensorrt_rtx", "1.7"),
    }


def test_the_source_is_seen():
    names = set().union(*map(touched, EVERY))
    assert {("Builder", "create_network"), ("IExecutionContext", "execute_async_v3"), ("OnnxParser", None)} <= names
    assert {("IOptimizationProfile", "set_shape"), ("IRuntimeCache", "deserialize")} <= names
    assert ("ICudaEngine", "get_aliased_input_tensor") in names
    assert len(names) > 45


@pytest.mark.parametrize("name", LISTINGS)
def test_every_member_that_is_used_by_its_name_exists(name):
    flavor, classes = flavor_of(LISTINGS[name]), LISTINGS[name]["classes"]
    flags = {flag for capability, flag in FLAGS.items() if flavor.can(capability)}
    wanted = {
        "ExecutionContextAllocationStrategy": set(ALLOCATIONS.values()),
        "TensorIOMode": {"INPUT", "OUTPUT"},
        "DataType": {"FLOAT", "HALF", "BF16", "INT64", "UINT8"},
        "SeekPosition": {"SET", "CUR", "END"},
        "EngineInvalidityDiagnostics": set(WHY) if flavor.can("engine_validity") else set(),
        "BuilderFlag": flags if flavor.can("build") else set(),
    }
    assert {
        kind: lacking for kind, members in wanted.items() if (lacking := members - set(classes.get(kind, ())))
    } == {}


@pytest.mark.parametrize("name", LISTINGS)
def test_every_name_that_is_used_exists(name):
    listing = LISTINGS[name]
    files = EVERY if name in BUILDERS else RUNNING
    assert {file: lacking for file in files if (lacking := missing(touched(file), listing))} == {}


@pytest.mark.parametrize("line", ["builder.build_engine(network)", "trt.BuilderFlags.REFIT", "trt.BuilderFlag.FP17"])
def test_a_misspelt_name_would_be_found(line):
    names = touched(SOURCE / "engine" / "build.py", f"from llmtrt.engine.flavor import Flavor\n{line}")
    assert all(missing(names, LISTINGS[name]) for name in BUILDERS)


def test_a_listing_over_stubs_is_what_the_library_itself_gives():
    """Of the one version that is installed here with its library."""
    flavor = choose("rtx")
    name = next((name for name in LISTINGS if name.endswith(flavor.version) and "rtx" in name), None)
    if name is None:
        pytest.skip(f"TensorRT-RTX {flavor.version} is installed, which has no listing")
    for kind, members in LISTINGS[name]["classes"].items():
        real = getattr(flavor.module, kind)
        assert members == sorted(member for member in dir(real) if not member.startswith("_")), kind
    listed = flavor_of(LISTINGS[name])
    assert listed.capabilities == flavor.capabilities
    assert sorted(listed.targets) == sorted(flavor.targets)


def test_what_the_flavors_can_do():
    """Every capability, of every version alike."""
    full, rtx = {"tensorrt"}, {"tensorrt_rtx"}
    every = full | rtx | {"tensorrt_lean", "tensorrt_dispatch"}
    able = {
        "build": full | rtx,
        "builds_without_gpu": rtx,
        "run": every,
        "refit": full | rtx,
        "refit_identical": full | rtx,
        "strip": full | rtx,
        "version_compatible": full,
        "host_code": every,
        "weight_streaming": every,
        "user_memory": every,
        "runtime_config": every,
        "cuda_graphs": rtx,
        "runtime_cache": rtx,
        "kernel_specialization": rtx,
        "engine_validity": rtx,
        "kv_cache_update": full | rtx,
        "empty_branches": rtx,
        "plugins": full,
    }
    assert able.keys() == CAPABILITIES.keys()
    for name, listing in LISTINGS.items():
        wanted = {capability for capability, wheels in able.items() if product(name)[0] in wheels}
        assert flavor_of(listing).capabilities == wanted, name


def test_what_a_flavor_cannot_do_is_not_asked_of_it():
    """The guards let a name pass only where the capability is absent, so each is of a class that some flavor has."""
    for (kind, member), capability in GUARDED.items():
        listings = [listing for listing in LISTINGS.values() if flavor_of(listing).can(capability)]
        assert listings, capability
        for listing in listings:
            assert kind in listing["classes"], (listing["wheel"], kind)
            assert member is None or member in listing["classes"][kind], (listing["wheel"], kind, member)
